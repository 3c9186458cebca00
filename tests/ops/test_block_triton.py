"""A block by Triton's kernels against the same by stock operators: on a GPU or interpreted."""

import copy
import threading

import pytest
import torch
from helpers.comparisons import compare_with_plain, randomized, relative_error

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')

# ruff: noqa: E402
from mmconv2former import Conv2Former
from mmconv2former.ops import block, block_stock, block_triton, depthwise
from mmconv2former.ops.block import RECOMPUTE, BlockParameters, fold, run_block
from mmconv2former.ops.norm import layer_norm

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
# Of results in the dtype; the interpreter rounds bfloat16 towards zero.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
# N, H, W, C, hidden channels, K
SHAPES = [(2, 5, 7, 8, 32, 3), (3, 4, 1, 12, 20, 5), (1, 1, 3, 7, 9, 3), (1, 9, 6, 72, 16, 3)]
if ON_GPU:
    SHAPES += [(2, 50, 80, 288, 1152, 11), (2, 25, 40, 576, 2304, 11), (1, 60, 44, 72, 288, 7)]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def normal(*shape, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def make(n, h, w, c, hidden, k, dtype):
    """Input, gradient, factors and parameters."""
    torch.manual_seed(0)
    sizes = dict(
        norm_1_weight=(c,), norm_1_bias=(c,), gate_weight=(c, c, 1, 1), gate_bias=(c,),
        value_weight=(c, c, 1, 1), value_bias=(c,), depthwise_weight=(c, 1, k, k),
        depthwise_bias=(c,), proj_weight=(c, c, 1, 1), proj_bias=(c,), scale_1=(c,),
        norm_2_weight=(c,), norm_2_bias=(c,), fc1_weight=(hidden, c, 1, 1), fc1_bias=(hidden,),
        pos_weight=(hidden, 1, 3, 3), pos_bias=(hidden,), fc2_weight=(c, hidden, 1, 1),
        fc2_bias=(c,), scale_2=(c,),
    )  # fmt: skip
    parameters = BlockParameters(
        **{
            name: normal(*size, dtype=dtype, scale=max(1, size[-1] * size[-2], size[1]) ** -0.5)
            if len(size) == 4
            else normal(*size, dtype=dtype)
            for name, size in sizes.items()
        }
    )
    factors = torch.rand(2, n, dtype=torch.float64).to(DEVICE, dtype)
    return normal(n, h, w, c, dtype=dtype), normal(n, h, w, c, dtype=dtype), factors, parameters


def values_and_gradients(steps, x, grad, factors, parameters, recompute, dtype):
    if steps is block_stock:
        folded = fold(parameters, dtype)
    else:
        (folded,) = block_triton.fold([parameters], dtype, None)
    out, kept = run_block(x, factors, folded, 1e-6, recompute, steps)
    grad_x, grads = block.run_block_backward(grad, kept, factors, folded, parameters, steps)
    return {'out': out, 'x': grad_x, **grads._asdict()}


@pytest.mark.parametrize('recompute', RECOMPUTE)
@pytest.mark.parametrize('has_factors', [False, True])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_values_and_gradients(shape, has_factors, recompute, dtype):
    x, grad, factors, parameters = make(*shape, torch.float64)
    factors = factors if has_factors else None
    arguments = x, grad, factors, parameters
    expected = values_and_gradients(block_stock, *arguments, recompute, torch.float64)
    cast = [None if t is None else t.to(dtype) for t in arguments[:3]]
    own = BlockParameters(*(parameter.to(dtype) for parameter in parameters))
    found = values_and_gradients(block_triton, *cast, own, recompute, dtype)
    for name, value in found.items():
        assert value.dtype == dtype
        assert value.shape == expected[name].shape
        assert relative_error(value.double(), expected[name]) < TOLERANCE[dtype] * 5, name


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision(shape, dtype):
    """Residuals and parameters in float32, products in half precision: as near as stock steps."""
    x, grad, factors, parameters = make(*shape, torch.float32)
    exact = [t.double() for t in (x, grad, factors)]
    wide = BlockParameters(*(parameter.double() for parameter in parameters))
    expected = values_and_gradients(block_stock, *exact, wide, 'elementwise', torch.float64)
    arguments = x, grad, factors, parameters, 'elementwise', dtype
    stock = values_and_gradients(block_stock, *arguments)
    found = values_and_gradients(block_triton, *arguments)
    for name, value in found.items():
        assert value.dtype == torch.float32
        allowed = 2 * relative_error(stock[name].double(), expected[name]) + 5e-3
        if not ON_GPU:  # the interpreter truncates where a GPU rounds
            allowed = 3 * allowed + 2e-2
        found_error = relative_error(value.double(), expected[name])
        assert found_error < allowed, name


def test_the_network(monkeypatch):
    """Blocks of several shapes, folded together: by Triton and without."""
    torch.manual_seed(0)
    arch = dict(channels=(8, 12), depths=(2, 1), kernel_size=(3, 5))
    model = Conv2Former(arch, out_indices=(0, 1), layer_scale_init_value=0.5).to(DEVICE).double()
    x = torch.randn(2, 3, 24, 16, device=DEVICE, dtype=torch.float64)
    calls = []
    real = block_triton.fold
    monkeypatch.setattr(block_triton, 'fold', lambda *a: calls.append(len(a[0])) or real(*a))
    results = []
    for setting in ('triton', 'native' if ON_GPU else 'stock'):
        monkeypatch.setattr(depthwise, 'setting', setting)
        model.zero_grad()
        outputs = model(x)
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, *(parameter.grad for parameter in model.parameters())])
    # The folded weights are kept for the backward pass.
    assert calls == [3]
    for value, reference in zip(*results):
        assert relative_error(value, reference) < 1e-10


@pytest.mark.parametrize('recompute', RECOMPUTE)
def test_the_network_equals_the_plain_implementation(recompute):
    torch.manual_seed(0)
    arch = dict(channels=(8, 12), depths=(1, 2), kernel_size=(5, 3))
    model = randomized(Conv2Former(arch, out_indices=(0, 1), recompute=recompute).double())
    x = torch.randn(2, 3, 24, 21, dtype=torch.float64, device=DEVICE)
    compare_with_plain(model.to(DEVICE), x, 1e-12, 1e-10)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_network_in_mixed_precision(dtype, monkeypatch):
    """As near to float64 as stock operators under the same autocast."""
    torch.manual_seed(0)
    arch = dict(channels=(8, 12), depths=(1, 1), kernel_size=3)
    model = randomized(Conv2Former(arch, out_indices=(0, 1))).to(DEVICE)
    x = torch.randn(2, 3, 24, 16, device=DEVICE)
    results = []
    for setting, network, autocast in [
        ('triton', model, True),
        ('native' if ON_GPU else 'stock', model, True),
        ('triton', copy.deepcopy(model).double(), False),
    ]:
        monkeypatch.setattr(depthwise, 'setting', setting)
        network.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=autocast):
            outputs = network(x if autocast else x.double())
        sum(output.double().square().sum() for output in outputs).backward()
        results.append([*outputs, *(parameter.grad for parameter in network.parameters())])
    for found, stock, exact in zip(*results):
        allowed = 2 * relative_error(stock.double(), exact) + 5e-3
        if not ON_GPU:  # the interpreter truncates where a GPU rounds
            allowed = 3 * allowed + 2e-2
        assert relative_error(found.double(), exact) < allowed


def test_addresses_are_copied_once():
    torch.manual_seed(0)
    arch = dict(channels=(8,), depths=(2,), kernel_size=3)
    model = Conv2Former(arch, out_indices=0).to(DEVICE)
    x = torch.randn(1, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        model(x)
        plan = block_triton.plans[model][1]
        before = model(x)[0]
        assert block_triton.plans[model][1] is plan
        model.stages[0][0].mlp.fc1.weight.mul_(2)  # in place: the address stays, the value counts
        model.stages[0][0].layer_scale_2.fill_(1)
        changed = model(x)[0]
        assert block_triton.plans[model][1] is plan
        assert relative_error(changed, before) > 1e-3
        model.stages[0][0].mlp.fc1.weight = torch.nn.Parameter(
            model.stages[0][0].mlp.fc1.weight / 2
        )
        model.stages[0][0].layer_scale_2.fill_(1e-6)
        torch.testing.assert_close(model(x)[0], before)
        assert block_triton.plans[model][1] is not plan


def test_results_are_the_same_in_every_run():
    x, grad, factors, parameters = make(*SHAPES[0], torch.float32)
    first, second = (
        values_and_gradients(block_triton, x, grad, factors, parameters, 'elementwise', x.dtype)
        for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_nothing_is_written_where_nothing_belongs():
    """Every element of a result is written: memory that was there before does not matter."""
    x, grad, factors, parameters = make(*SHAPES[1], torch.float32)
    results = []
    real = torch.empty_like
    for filling in (float('nan'), 1e9):

        def poisoned(*args, _filling=filling, **kwargs):
            return real(*args, **kwargs).fill_(_filling)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'empty_like', poisoned)
            results.append(
                values_and_gradients(
                    block_triton, x, grad, factors, parameters, 'expansion', x.dtype
                )
            )
    for name, value in results[0].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize('step', ['normalize', 'modulation_gradients'])
def test_falls_back_if_a_kernel_does_not_compile(step, monkeypatch):
    def fail(*args):
        raise block_triton.CompilationError('no compiler')

    torch.manual_seed(0)
    model = Conv2Former(dict(channels=(8,), depths=(1,), kernel_size=3), out_indices=0).to(DEVICE)
    model, x = model.double(), torch.randn(1, 3, 16, 16, device=DEVICE, dtype=torch.float64)
    model(x)[0].square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(block_triton, step, fail)
    monkeypatch.setattr(depthwise, 'failures', [])
    try:
        model(x)[0].square().sum().backward()
        assert 'no compiler' in depthwise.failures[0]
    finally:
        depthwise.failures.clear()
        depthwise.choice_for.cache_clear()
    for parameter, reference in zip(model.parameters(), expected):
        assert relative_error(parameter.grad, reference) < 1e-10


def test_names_are_the_same_in_both():
    names = [
        name for name, value in vars(block_stock).items()
        if getattr(value, '__module__', '') == block_stock.__name__
        and name not in ('unfold_columns', 'unfold_rows')
    ]  # fmt: skip
    assert len(names) > 10
    assert all(hasattr(block_triton, name) for name in names)


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


def test_sums_of_many_shares():
    """Different numbers of shares and of columns, more and less than a program handles at once."""
    torch.manual_seed(0)
    sizes = [(1, 5), (150, 32), (65, 72), (64, 1)]
    for number in (1, 2, 4):
        parts = [normal(*size) for size in sizes[:number]]
        for found, part in zip(block_triton.finish_sums(*parts), parts):
            torch.testing.assert_close(found, part.sum(0))


@pytest.mark.parametrize('channels', [3, 72, 200])
@pytest.mark.parametrize('programs', [1, 2, 7, 100])
def test_column_sums_in_any_number_of_shares(channels, programs, monkeypatch):
    monkeypatch.setattr(block_triton, 'programs_at_once', lambda device: programs)
    grad, x = normal(2, 9, 10, channels), normal(2, 9, 10, 4)
    of_weight, shares = block_triton.product_gradients(grad, x, None)
    torch.testing.assert_close(shares.sum(0), grad.sum((0, 1, 2)))
    torch.testing.assert_close(of_weight, torch.einsum('nhwo,nhwi->oi', grad, x))


def small(depth=2, **options):
    torch.manual_seed(0)
    arch = dict(channels=(8,), depths=(depth,), kernel_size=3)
    model = Conv2Former(arch, out_indices=0, layer_scale_init_value=0.5, **options).to(DEVICE)
    return randomized(model).eval(), torch.randn(1, 3, 16, 16, device=DEVICE)


def without_triton(model, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(depthwise, 'setting', 'native' if ON_GPU else 'stock')
        return copy.deepcopy(model)(x)[0]


def transpose_a_weight(model):
    weight = model.stages[0][0].mlp.fc1.weight
    turned = weight.detach().flatten(1).t().contiguous().t()[..., None, None]
    model.stages[0][0].mlp.fc1.weight = torch.nn.Parameter(turned)


def stride_a_bias(model):
    bias = model.stages[0][1].attn.proj.bias
    wide = torch.stack([bias.detach(), torch.ones_like(bias)], 1)
    model.stages[0][1].attn.proj.bias = torch.nn.Parameter(wide[:, 0])


def narrow_a_block(model):
    model.stages[0][0].half()


@pytest.mark.parametrize('change', [transpose_a_weight, stride_a_bias, narrow_a_block])
def test_parameters_that_kernels_cannot_read(change, monkeypatch):
    """Not contiguous, or of several dtypes: layer by layer, or folded apart."""
    model, x = small()
    change(model)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=change is narrow_a_block):
        expected = without_triton(model, x, monkeypatch)
        found = model(x)[0]
    tolerance = 0.1 if change is narrow_a_block else 1e-4
    assert relative_error(found.double(), expected.double()) < tolerance


def test_parameters_in_one_half_precision_and_autocast_in_the_other(monkeypatch):
    model, x = small()
    model.stages.half()
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        expected = without_triton(model, x, monkeypatch)
        assert relative_error(model(x)[0].double(), expected.double()) < 0.1


def test_outputs_can_be_changed_in_place():
    model, x = small()
    out = model(x)[0]
    out.relu_()
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_another_thread_does_not_use_the_folded_weights():
    model, x = small(depth=1)
    block_ = model.stages[0][0]
    with torch.no_grad():
        y = torch.randn(1, 4, 4, 8, device=DEVICE)
        expected = block_(y)
        (folded,) = block_triton.fold([block_.plain_parameters()], torch.float32, None)
        broken = folded._replace(fc2_bias=folded.fc2_bias + 1)
        block_.ready = threading.get_ident() + 1, block_.plain_parameters(), broken
        assert torch.equal(block_(y), expected)
        block_.ready = threading.get_ident(), block_.plain_parameters(), broken
        assert not torch.equal(block_(y), expected)
        assert copy.deepcopy(block_).ready is None
    model(x)
    assert block_.ready is None


def test_the_deployed_form_after_a_call_by_stock_steps(monkeypatch):
    """An empty batch, which no kernel takes, comes first."""
    model, x = small()
    with torch.no_grad():
        expected = model(x)[0]
        deployed = copy.deepcopy(model).switch_to_deploy()
        with torch.autocast(DEVICE, torch.bfloat16):  # not by oneDNN's operators
            reference = model(x)[0]
            deployed(x[:0])
            found = deployed(x)[0]
    assert relative_error(reference.float(), expected) < 0.1
    assert relative_error(found.float(), expected) < 0.1


def test_a_fold_that_does_not_compile(monkeypatch):
    """The weights are then in the stock layout, and so are the steps."""
    block_ = small(depth=1)[0].stages[0][0].double()
    y = torch.randn(1, 4, 4, 8, device=DEVICE, dtype=torch.float64)
    expected = block_(y)

    def fail(*args):
        raise block_triton.CompilationError('no space left')

    monkeypatch.setattr(block_triton, 'fold', fail)
    monkeypatch.setattr(depthwise, 'failures', [])
    try:
        assert relative_error(block_(y), expected) < 1e-12
    finally:
        depthwise.choice_for.cache_clear()


def test_recomputed_blocks_are_planned_once(monkeypatch):
    calls = []
    real = block_triton.make_plan
    monkeypatch.setattr(block_triton, 'make_plan', lambda b: calls.append(len(b)) or real(b))
    model, x = small(with_cp=True)
    model.train()
    for _ in range(3):
        model(x)[0].sum().backward()
    assert calls == [2, 1, 1]
