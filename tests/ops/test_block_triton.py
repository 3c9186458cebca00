"""A block by Triton's kernels against the same by stock operators: on a GPU or interpreted."""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from common.counting import count_bytes_kept
from common.launches import replaced
from helpers.comparisons import compare_with_plain, exact_float32, randomized, relative_error
from mmengine.runner import turn_on_activation_checkpointing
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')

# ruff: noqa: E402
from mmconv2former import Conv2Former
from mmconv2former.models import blocks as blocks_module
from mmconv2former.models.blocks import Block
from mmconv2former.models.deploy import DeployedBlock
from mmconv2former.ops import (
    block,
    block_stock,
    block_triton,
    depthwise,
    depthwise_triton,
    folding_triton,
    norm_triton,
    pointwise_triton,
    triton_support,
)
from mmconv2former.ops.block import RECOMPUTE, run_blocks, run_blocks_backward
from mmconv2former.ops.folding import BlockParameters
from mmconv2former.ops.launch import Launcher
from mmconv2former.ops.norm import layer_norm

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
WITHOUT_TRITON = 'native' if ON_GPU else 'stock'
# Of results in the dtype.
TOLERANCE = {torch.float64: 5e-12, torch.float32: 1e-5}
# N, H, W, C, hidden channels, K; recompute and dtype
SHAPES = [(2, 5, 7, 8, 32, 3), (3, 4, 1, 12, 20, 5), (1, 1, 3, 7, 9, 3), (1, 5, 3, 72, 16, 3)]
CASES = [
    *((SHAPES[0], recompute, torch.float64) for recompute in RECOMPUTE),
    (SHAPES[0], 'elementwise', torch.float32),
    (SHAPES[1], 'nothing', torch.float64),
    (SHAPES[2], 'expansion', torch.float64),
    (SHAPES[3], 'elementwise', torch.float64),
]
if ON_GPU:
    SHAPES += [(2, 50, 80, 288, 1152, 11), (2, 25, 40, 576, 2304, 11), (1, 60, 44, 72, 288, 7)]
    CASES = list(itertools.product(SHAPES, RECOMPUTE, TOLERANCE))


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    folding_triton.plans.clear()
    with exact_float32():
        yield
    triton_support.failures.clear()


def normal(*shape, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


# ------------------------------------------------------------------------------ steps of blocks
def make(n, h, w, c, hidden, k, dtype):
    """Input, gradient, and factors and parameters of two blocks."""
    torch.manual_seed(0)
    sizes = dict(gate=(c, c, 1, 1), value=(c, c, 1, 1), depthwise=(c, 1, k, k), proj=(c, c, 1, 1),
                 fc1=(hidden, c, 1, 1), pos=(hidden, 1, 3, 3), fc2=(c, hidden, 1, 1))  # fmt: skip
    parameters = [
        BlockParameters(
            **{
                name: normal(*sizes[layer], dtype=dtype, scale=math.prod(sizes[layer][1:]) ** -0.5)
                if layer in sizes and name.endswith('weight')
                else normal(sizes.get(layer, (c,))[0], dtype=dtype)
                for name in BlockParameters._fields
                for layer in [name.removesuffix('_weight').removesuffix('_bias')]
            }
        )
        for _ in range(2)
    ]
    x, grad = (normal(n, h, w, c, dtype=dtype) for _ in range(2))
    return x, grad, torch.rand(2, 2, n, device=DEVICE, dtype=dtype), parameters


def values_and_gradients(steps, x, grad, factors, parameters, recompute, dtype):
    weights = steps.fold(parameters, dtype)
    factors = [(None, None)] * 2 if factors is None else factors
    out, saved = run_blocks(x, factors, weights, 1e-6, recompute, steps)
    grad_x, grads = run_blocks_backward(grad, saved, weights, parameters, steps)
    return {'out': out, 'x': grad_x} | {
        f'{number}.{name}': value
        for number, of_block in enumerate(grads)
        for name, value in of_block._asdict().items()
    }


def cast(x, grad, factors, parameters, dtype):
    x, grad, factors = (None if value is None else value.to(dtype) for value in (x, grad, factors))
    parameters = [BlockParameters(*(value.to(dtype) for value in p)) for p in parameters]
    return x, grad, factors, parameters


@pytest.mark.parametrize(('shape', 'recompute', 'dtype'), CASES, ids=str)
def test_values_and_gradients(shape, recompute, dtype):
    x, grad, factors, parameters = make(*shape, torch.float64)
    operands = x, grad, None if recompute == 'expansion' else factors, parameters
    exact = values_and_gradients(block_stock, *operands, recompute, torch.float64)
    operands = cast(*operands, dtype)
    for name, value in values_and_gradients(block_triton, *operands, recompute, dtype).items():
        assert value.dtype == dtype
        assert value.shape == exact[name].shape
        assert relative_error(value.double(), exact[name]) < TOLERANCE[dtype], name


def assert_as_near(found, stock, exact, name=''):
    """Within a factor of two of the stock operators' error."""
    allowed = 2 * relative_error(stock.double(), exact) + 5e-3
    if not ON_GPU:  # the interpreter truncates where a GPU rounds
        allowed = 3 * allowed + 2e-2
    assert relative_error(found.double(), exact) < allowed, name


@pytest.mark.parametrize('shape', SHAPES if ON_GPU else SHAPES[:1], ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision(shape, dtype):
    """Residuals and parameters in float32, convolutions in half precision."""
    operands = make(*shape, torch.float32)
    wide = cast(*operands, torch.float64)
    exact = values_and_gradients(block_stock, *wide, 'elementwise', torch.float64)
    stock = values_and_gradients(block_stock, *operands, 'elementwise', dtype)
    for name, value in values_and_gradients(block_triton, *operands, 'elementwise', dtype).items():
        assert value.dtype == torch.float32
        assert_as_near(value, stock[name], exact[name], name)


def test_inputs_that_kernels_cannot_read(monkeypatch):
    """Neither contiguous nor aligned, as both may come from outside of a block."""

    def checked(launcher, programs, tensors, sizes):
        assert tensors[0].data_ptr() % 16 == 0  # which the interpreter does not need
        launch(launcher, programs, tensors, sizes)

    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, '__call__', checked)
    x, grad, *others = make(*SHAPES[0], torch.float64)
    expected = values_and_gradients(block_triton, x, grad, *others, 'elementwise', x.dtype)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for other in (shifted, x.transpose(1, 2).contiguous().transpose(1, 2)):
        other_grad = grad.transpose(0, 3).contiguous().transpose(0, 3)
        found = values_and_gradients(
            block_triton, other, other_grad, *others, 'elementwise', x.dtype
        )
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
        with torch.no_grad():
            y = layer_norm(other, None, None, 1e-6, x.dtype)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6))


def test_every_element_is_written_and_every_run_is_the_same():
    """Memory that was there before does not matter."""
    operands = make(*SHAPES[1], torch.float32)
    results = []
    for filling in (float('nan'), 1e9):
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((torch, 'empty_like'), (torch.Tensor, 'new_empty')):
                original = getattr(owner, name)

                def filled(*args, real=original, fill=filling, **options):
                    result = real(*args, **options)
                    return result.fill_(fill) if result.is_floating_point() else result

                patch.setattr(owner, name, filled)
            results.append(
                values_and_gradients(block_triton, *operands, 'expansion', torch.float32)
            )
    for name, value in results[0].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, results[1][name]), name


def test_both_have_the_same_steps():
    names = {name for name, value in vars(block_stock).items()
             if getattr(value, '__module__', '') == block_stock.__name__}  # fmt: skip
    assert len(names) > 8
    assert all(hasattr(block_triton, name) for name in names | {*block_stock.__all__})


@pytest.mark.parametrize('size', [(1, 5), (150, 32), (65, 72), (64, 1)])
def test_sums_of_many_shares(size):
    """Numbers of shares and of columns, more and less than a program handles at once."""
    torch.manual_seed(0)
    partial = normal(*size)
    torch.testing.assert_close(norm_triton.finish_sums(partial), partial.sum(0))


@pytest.mark.parametrize(('channels', 'programs'), [(3, 1), (72, 2), (200, 7), (72, 100)])
def test_column_sums_in_any_number_of_shares(channels, programs):
    grad, x = normal(2, 9, 10, channels), normal(2, 9, 10, 4)
    with replaced(norm_triton, programs_at_once=lambda device: programs):
        of_weight, shares = block_triton.pointwise_weight_gradients(grad, x, None)
    assert len(shares) == min(3, -(-programs // -(-channels // 64)))  # of 180 positions by 64
    torch.testing.assert_close(shares.sum(0), grad.sum((0, 1, 2)))
    torch.testing.assert_close(of_weight, torch.einsum('nhwo,nhwi->oi', grad, x))


# ------------------------------------------------------------------------------------------- norms
@pytest.mark.parametrize('channels_first', [False, True])
@pytest.mark.parametrize('grad_first', [False, True])
@pytest.mark.parametrize('shape', [(2, 3, 5, 8), (1, 7, 1, 12), (3, 2, 9, 72)])
def test_layer_norm(shape, channels_first, grad_first):
    """Values, memory layout and gradients of the norms outside of blocks."""
    x, grad = normal(*shape).requires_grad_(), normal(*shape)
    weight, bias = normal(shape[-1]).requires_grad_(), normal(shape[-1]).requires_grad_()
    if grad_first:
        grad = grad.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y = layer_norm(x, weight, bias, 1e-6, x.dtype, channels_first)
    assert y.shape == x.shape
    assert (y.permute(0, 3, 1, 2) if channels_first else y).is_contiguous()
    assert 'LayerNormFunction' in type(y.grad_fn).__name__
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    reference = torch.nn.functional.layer_norm(x, shape[-1:], weight, bias, 1e-6)
    torch.testing.assert_close(y, reference)
    expected = torch.autograd.grad(reference, (x, weight, bias), grad)
    torch.testing.assert_close(found, expected)


def test_layer_norm_in_half_precision():
    x = normal(2, 3, 5, 8, dtype=torch.float32).requires_grad_()
    weight, bias = (normal(8, dtype=torch.float32).requires_grad_() for _ in range(2))
    y = layer_norm(x, weight, bias, 1e-6, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    reference = torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-6)
    assert relative_error(y, reference) < 1e-2
    grad = normal(2, 3, 5, 8, dtype=torch.bfloat16)
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    expected = torch.autograd.grad(reference, (x, weight, bias), grad.float())
    for value, exact in zip(found, expected):
        assert value.dtype == torch.float32
        assert relative_error(value, exact) < 1e-2


# ------------------------------------------------------------------------------------- the network
def small(channels=(8,), depths=(2,), **options):
    """A network and its input."""
    torch.manual_seed(0)
    arch = dict(channels=channels, depths=depths, kernel_size=3)
    indices = tuple(range(len(channels)))
    model = randomized(Conv2Former(arch, out_indices=indices, **options)).to(DEVICE)
    return model, torch.randn(2, 3, 16, 12, device=DEVICE)


def with_gradients(model, x):
    model.zero_grad()
    outputs = model(x)
    sum(output.double().square().sum() for output in outputs).backward()
    return [*outputs, *(p.grad for p in model.parameters() if p.requires_grad)]


def without_triton(function, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, 'setting', WITHOUT_TRITON)
        return function(*args)


@pytest.fixture
def calls(monkeypatch):
    """Numbers of blocks planned and of weights laid out together, and dtypes of single ones."""
    found = SimpleNamespace(plans=[], together=[], laid_out=[])
    plan, together, one = (
        folding_triton.make_plan, folding_triton.lay_out_together, depthwise_triton.lay_out,
    )  # fmt: skip

    def make_plan(blocks):
        found.plans.append(len(blocks))
        return plan(blocks)

    def lay_out_together(weights, dtype):
        found.together.append(len(weights))
        return together(weights, dtype)

    def lay_out(weight, dtype):
        result = one(weight, dtype)
        found.laid_out += [dtype] * (result is not weight)
        return result

    monkeypatch.setattr(folding_triton, 'make_plan', make_plan)
    monkeypatch.setattr(folding_triton, 'lay_out_together', lay_out_together)
    monkeypatch.setattr(depthwise_triton, 'lay_out', lay_out)
    return found


def test_the_network_equals_the_plain_implementation():
    """Blocks of several shapes, folded together."""
    model, x = small(channels=(8, 12), depths=(1, 2))
    compare_with_plain(model.double(), x.double(), 1e-12, 1e-10)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_network_in_mixed_precision(dtype):
    """As near to float64 as stock operators under the same autocast."""
    model, x = small(channels=(8, 12), depths=(1, 1))
    exact = with_gradients(copy.deepcopy(model).double(), x.double())
    with torch.autocast(DEVICE, dtype):
        found = [value.clone() for value in with_gradients(model, x)]
        stock = without_triton(with_gradients, model, x)
    for values in zip(found, stock, exact):
        assert_as_near(*values)


@pytest.mark.parametrize('recompute', ['nothing', 'elementwise'])
def test_weights_are_folded_once_a_pass(recompute, calls, monkeypatch):
    """Together at the start, used by every layer, and dropped at the end, also after a failure."""
    model, x = small(channels=(8, 16), depths=(1, 1), recompute=recompute)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = model(x)
    assert not blocks_module.current_pass.prepared
    assert calls.together == [4]
    calls.laid_out.clear()
    sum(output.sum() for output in outputs).backward()
    assert calls.together == [4]
    assert not calls.laid_out
    monkeypatch.setattr(model, '_forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert not blocks_module.current_pass.prepared


def test_weights_of_the_deployed_form_are_prepared_once(calls):
    """They do not change any more: for each dtype in the first pass only."""
    model, x = small(channels=(8, 16), depths=(1, 1))
    model.switch_to_deploy()
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            model(x)
    assert calls.laid_out == [torch.bfloat16] * 4
    model.double()
    for _ in range(2):
        model(x.double())
    assert calls.laid_out == [torch.bfloat16] * 4 + [torch.float64] * 4


def test_the_deployed_form_after_a_call_by_stock_steps():
    """An empty batch, which no kernel takes, comes first."""
    model, x = small()
    model.eval()
    deployed = copy.deepcopy(model).switch_to_deploy()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):  # not by oneDNN's operators
        expected = model(x)[0].float()
        deployed(x[:0])
        assert relative_error(deployed(x)[0].float(), expected) < 0.1


@torch.no_grad()
def test_assigned_weights_of_the_deployed_form(monkeypatch):
    """Kernels get contiguous and aligned ones, whatever `load_state_dict` assigned."""
    arch = dict(channels=(8, 16, 8, 24), depths=(1, 1, 1, 1), kernel_size=3)
    model = randomized(Conv2Former(arch)).to(DEVICE).eval().switch_to_deploy().bfloat16()
    x = normal(1, 3, 32, 32).bfloat16()
    expected = model(x)

    def moved(value):
        """A copy whose memory is not aligned, and transposed if it is a matrix."""
        value = value.t() if value.dim() == 2 else value
        memory = torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)
        value = memory[1:].view(value.shape).copy_(value)
        return value.t() if value.dim() == 2 else value

    model.load_state_dict({name: moved(v) for name, v in model.state_dict().items()}, assign=True)
    multiply, used = pointwise_triton.multiply, []

    def checked(*tensors):
        used.extend(tensor for tensor in tensors if tensor is not None)
        multiply(*tensors)

    monkeypatch.setattr(pointwise_triton, 'multiply', checked)
    for value, reference in zip(model(x), expected):
        assert torch.equal(value, reference)
    assert used
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in used)


@torch.no_grad()
def test_weights_may_change_between_passes(calls):
    """In place and behind autograd's back, such as averages of weights, or by others."""
    model, x = small()
    model, x = model.double().eval(), x.double()
    layer = model.stages[0][0].mlp.fc1
    for change, plans in [
        (lambda: None, 1),
        (lambda: layer.weight.data.mul_(2), 1),
        (lambda: setattr(layer, 'weight', torch.nn.Parameter(layer.weight / 3)), 2),
    ]:
        change()
        torch.testing.assert_close(model(x), without_triton(model, x))
        assert calls.plans == [2] * plans


def test_recomputed_blocks_are_planned_once(calls):
    model, x = small(with_cp=True)
    for _ in range(2):
        model(x)[0].sum().backward()
    assert calls.plans == [2, 1, 1]


def test_old_plans_are_dropped(calls, monkeypatch):
    monkeypatch.setattr(folding_triton, 'MOST_PLANS', 1)
    for model, x in (small(), small()):
        model(x)
        assert len(folding_triton.plans) == 1
    assert calls.plans == [2, 2]


def test_frozen_stages_get_no_gradient():
    """Though the weights of frozen and trained layers are folded together."""
    model, x = small(channels=(8, 16), depths=(1, 1), frozen_stages=1, out_norm=False)
    first, last = model(x)
    assert not first.requires_grad
    last.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


@pytest.mark.parametrize(
    ('module', 'step'),
    [
        (block_triton, 'add_normalize'),
        (block_triton, 'modulation_gradients'),
        (block_triton, 'fold'),
        (norm_triton, 'layer_norm'),
    ],
)
def test_falls_back_if_a_kernel_does_not_compile(module, step, monkeypatch):
    """In the forward pass, in the backward pass, before, and in a norm outside of blocks."""
    model, x = small(depths=(1,))
    model, x = model.double(), x.double()
    expected = [value.clone() for value in with_gradients(model, x)]

    def fail(*args):
        raise triton_support.CompilationError('no compiler')

    monkeypatch.setattr(module, step, fail)
    for value, reference in zip(with_gradients(model, x), expected):
        assert relative_error(value, reference) < 1e-10
    assert 'no compiler' in triton_support.failures[0]


def transpose_a_weight(model):
    weight = model.stages[0][0].mlp.fc1.weight
    turned = weight.detach().flatten(1).t().contiguous().t()[..., None, None]
    model.stages[0][0].mlp.fc1.weight = torch.nn.Parameter(turned)


def stride_a_bias(model):
    bias = model.stages[0][1].attn.proj.bias
    wide = torch.stack([bias.detach(), torch.ones_like(bias)], 1)
    model.stages[0][1].attn.proj.bias = torch.nn.Parameter(wide[:, 0])


@pytest.mark.parametrize(
    ('change', 'tolerance'),
    [
        (transpose_a_weight, 1e-4),
        (stride_a_bias, 1e-4),
        (lambda model: model.stages[0][0].half(), 0.1),
        (lambda model: model.stages.half(), 0.1),
    ],
)
def test_parameters_that_kernels_cannot_read(change, tolerance):
    """Not contiguous, of several dtypes, or in one half precision under autocast to the other."""
    model, x = small()
    change(model.eval())
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=tolerance == 0.1):
        expected = without_triton(model, x)[0]
        assert relative_error(model(x)[0].double(), expected.double()) < tolerance


def test_outputs_can_be_changed_in_place():
    model, x = small(depths=(1,))
    out = model(x)[0]
    out.relu_()
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_what_is_prepared_is_for_one_pass():
    """Another thread, or a network that runs in between, does not use it."""
    part = small(depths=(1,))[0].stages[0][0]
    y = torch.randn(1, 4, 4, 8, device=DEVICE)
    expected = part(y)
    with blocks_module.prepare([part], y):
        blocks_module.current_pass.prepared[part].weights.fc2_bias.add_(1)
        with ThreadPoolExecutor() as pool:
            assert torch.equal(pool.submit(part, y).result(), expected)
        with blocks_module.prepare([], y):
            assert torch.equal(part(y), expected)
        assert not torch.equal(part(y), expected)
        assert not torch.equal(blocks_module.run_in_turn([part], y), expected)
    assert torch.equal(part(y), expected)


# --------------------------------------------------------------------------- blocks as one function
@pytest.fixture
def together(monkeypatch):
    """Numbers of blocks that ran as one function."""
    numbers = []
    for kind in (Block, DeployedBlock):

        def run_together(blocks, x, real=kind.run_together):
            numbers.append(len(blocks))
            return real(blocks, x)

        monkeypatch.setattr(kind, 'run_together', staticmethod(run_together))
    return numbers


def five_blocks(**options):
    model, x = small(depths=(5,), out_norm=False, **options)
    return model, x[..., :8, :8]


def test_several_blocks_as_one_function(together, monkeypatch):
    """Bit by bit what they give one by one, in training and deployed."""
    model, x = five_blocks()
    deployed = copy.deepcopy(model).switch_to_deploy()
    found = []
    for most in (1, 4):
        monkeypatch.setattr(blocks_module, 'MOST_TOGETHER', most)
        with torch.autocast(DEVICE, torch.bfloat16):
            found.append([value.clone() for value in with_gradients(model, x)])
            found[-1] += deployed(x)
    assert together == [1] * 10 + [4, 1] * 2
    for values in zip(*found):
        assert torch.equal(*values)


@pytest.mark.parametrize('is_deployed', [False, True])
def test_blocks_that_something_watches_run_alone(is_deployed, together):
    """What is attached to a block is called; the other blocks stay together."""
    model, x = five_blocks()
    model = model.switch_to_deploy() if is_deployed else model.eval()
    stage = model.stages[0]
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        expected = model(x)[0]
        forward = stage[3].forward
        stage[1].register_forward_hook(lambda *_: together.append('hook'))
        stage[3].forward = lambda y: together.append('forward') or forward(y)
        assert torch.equal(model(x)[0], expected)
    assert together == [4, 1, 1, 1, 'hook', 1, 'forward', 1, 1]


@pytest.mark.parametrize('is_deployed', [False, True])
@torch.no_grad()
def test_compiled_blocks_and_hooks_on_all_modules(is_deployed, together):
    model, x = five_blocks()
    model = model.switch_to_deploy() if is_deployed else model.eval()
    first = model.stages[0][0]
    first._compiled_call_impl = first._call_impl  # as `first.compile()` sets it
    with torch.autocast(DEVICE, torch.bfloat16):
        model(x)
        assert together == [1, 4]
        with register_module_forward_hook(lambda *_: None):
            model(x)
    assert together == [1, 4] + [1] * 5 * is_deployed  # the layers of a `Block` run one by one


@pytest.mark.parametrize('is_deployed', [False, True])
def test_what_hooks_change_counts_for_the_blocks_behind(is_deployed, together):
    """A hook on the first block doubles the batch and trains an adapter."""
    model, x = five_blocks(drop_path_rate=0.0 if is_deployed else 0.5)
    model = model.switch_to_deploy() if is_deployed else model
    scale = torch.ones(8, device=DEVICE, requires_grad=True)
    model.stages[0][0].register_forward_hook(lambda _, args, y: torch.cat([y * scale, y]))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = model(x)[0]
    out.sum().backward()
    assert len(out) == 2 * len(x)
    assert scale.grad.abs().min() > 0
    assert together == ([1] if is_deployed else [1, 4])


def test_frozen_blocks_save_nothing(together, monkeypatch):
    model, x = five_blocks()
    for part in model.stages[0][:2]:
        part.requires_grad_(False)
    for part in model.downsample_layers:
        part.requires_grad_(False)
    kept = count_bytes_kept(model, x)
    assert together == [2, 3]
    assert kept < 0.8 * count_bytes_kept(five_blocks()[0], x)
    monkeypatch.setattr(block, 'BlocksFunction', None)
    model.requires_grad_(False)(x)


def checkpointed(part, use_reentrant):
    forward = part.forward
    part.forward = lambda y: checkpoint(forward, y, use_reentrant=use_reentrant)


class CheckpointedBlock(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


CHECKPOINTS = {
    'none': lambda model: None,
    'with_cp': lambda model: [setattr(part, 'with_cp', True) for part in model.stages[0]],
    'stage': lambda model: checkpointed(model.stages[0], False),
    'stage, reentrant': lambda model: checkpointed(model.stages[0], True),
    'network, reentrant': lambda model: checkpointed(model, True),
    'network of with_cp, reentrant': lambda model: (
        CHECKPOINTS['with_cp'](model), checkpointed(model, True)
    ),
    'blocks': lambda model: turn_on_activation_checkpointing(model, ['stages.0.1', 'stages.0.2']),
    'subclass': lambda model: [
        setattr(part, '__class__', CheckpointedBlock) for part in model.stages[0]
    ],
}  # fmt: skip


@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_activation_checkpointing_with_drop_path(kind):
    """The backward pass drops the same images: the gradient is that by finite differences."""
    model, x = small(depths=(3,), drop_path_rate=0.6, out_norm=False)
    model.double().downsample_layers.eval()  # no statistics of the batch
    CHECKPOINTS[kind](model)
    x = x[..., :8, :8].double().repeat(2, 1, 1, 1)
    direction = 1e-5 * torch.randn_like(x)

    def loss(x):
        torch.manual_seed(1)
        return model(x)[0].square().sum()

    x.requires_grad_()
    loss(x).backward()
    with torch.no_grad():
        expected = (loss(x + direction) - loss(x - direction)) / 2
    torch.testing.assert_close((x.grad * direction).sum(), expected, rtol=1e-4, atol=0)


def test_drop_path_of_several_blocks():
    """Whole images, with the rates of the blocks, scaled so that the mean is kept."""
    model, _ = small(depths=(3,), drop_path_rate=0.5)
    blocks = list(model.stages[0])
    x = torch.empty(40_000, 1, 1, 8, device=DEVICE)
    none, *pairs = blocks_module.draw_factors(blocks, x)
    assert none == (None, None)
    for rate, pair in zip((0.25, 0.5), pairs):
        assert not torch.equal(*pair)
        for factors in pair:
            values, counts = factors.abs().unique(return_counts=True)
            expected = torch.tensor([0, 1 / (1 - rate)], device=DEVICE)
            torch.testing.assert_close(values, expected)
            assert abs(counts[0] / 40_000 - rate) < 0.01
    assert blocks_module.draw_factors(blocks, x.bfloat16())[1][0].dtype == torch.bfloat16
    assert blocks_module.draw_factors(model.eval().stages[0], x) == [(None, None)] * 3
