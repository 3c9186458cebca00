"""What people attach to the network works: hooks, wrappers, parametrizations, transforms.

A block with a hooked or replaced layer runs layer by layer, all others as one function.
"""

import pytest
import torch
from helpers import ROOT
from helpers.comparisons import (
    SMALL_ARCHS,
    SMALL_ISOTROPIC_ARCH,
    compare,
    leaves,
    loss_of,
    plain_outputs,
    randomized,
    relative_error,
)
from helpers.pages import read_blocks
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.models import blocks
from mmconv2former.models.blocks import Block
from mmconv2former.ops import DepthwiseConv, depthwise

ARCH = SMALL_ARCHS['kernels']
BLOCKS = sum(ARCH['depths'])
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.double)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Plain blocks run as one function in any mode, not only where it is faster on a CPU."""
    monkeypatch.setattr(blocks, 'is_worth_it', lambda x, recompute: True)


@pytest.fixture
def fast(monkeypatch):
    """Gets the parameters of each block that does not run layer by layer."""
    calls = []
    real = blocks.compute_blocks
    monkeypatch.setattr(
        blocks, 'compute_blocks', lambda *args: calls.extend(args[2]) or real(*args)
    )
    return calls


def build(**options):
    return randomized(Conv2Former(ARCH, **options).double())


def ignore(*_):
    """A hook."""


# ------------------------------------------------------------------------------------------ hooks
@pytest.mark.parametrize('network', [Conv2Former, Conv2FormerIsotropic])
@pytest.mark.parametrize('training', [False, True])
def test_hooks_on_every_module_are_called(network, training):
    model = network(ARCH if network is Conv2Former else SMALL_ISOTROPIC_ARCH).train(training)
    modules = dict(model.named_modules())
    modules = {n: m for n, m in modules.items() if not isinstance(m, nn.ModuleList)}
    called = {'forward': set(), 'before': set(), 'backward': set()}
    for part, module in modules.items():
        module.register_forward_hook(lambda *_, n=part: called['forward'].add(n))
        module.register_forward_pre_hook(lambda *_, n=part: called['before'].add(n))
        module.register_full_backward_hook(lambda *_, n=part: called['backward'].add(n))
    with torch.set_grad_enabled(training):
        outputs = model(X.float())
    assert called['forward'] == called['before'] == set(modules)
    if training:
        loss_of(outputs).backward()
        assert called['backward'] == set(modules)


@pytest.mark.parametrize('recompute', ['nothing', 'elementwise'])
def test_hooks_do_not_change_values(recompute, fast):
    """Values and gradients are those of the plain network; without the hooks it is fast again."""
    model = build(recompute=recompute).eval()
    state = leaves(model)
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, i, output, n=name: seen.update({n: output.shape[-1]}))
        for name, layer in model.named_modules()
        if not [*layer.children()]
    ]
    compare(model, model(X), plain_outputs(model, X, state), state, 1e-12, 1e-10)
    assert not fast
    assert seen['stages.2.1.mlp.fc1'] == 40
    for handle in handles:
        handle.remove()
    model(X)
    assert len(fast) == BLOCKS


@pytest.mark.parametrize('with_cp', [False, True])
def test_hooks_on_stages(with_cp, fast):
    """They see (N, H, W, C) and may change it; the blocks stay as fast as they were."""
    model = build(with_cp=with_cp)
    shapes = {}

    def hook(module, inputs, output):
        shapes[names[module]] = [tuple(inputs[0].shape), tuple(output.shape)]
        return 0 * output if names[module] == 'stages.1' else None

    parts = ['stages.1', 'downsample_layers.2', 'stages.2', 'stages.2.1']
    names = {model.get_submodule(name): name for name in parts}
    for module in names:
        module.register_forward_hook(hook)
    outputs = model(X)
    assert len(fast) == BLOCKS
    assert shapes == {
        'stages.1': [(1, 8, 8, 8), (1, 8, 8, 8)],
        'downsample_layers.2': [(1, 8, 8, 8), (1, 4, 4, 10)],
        'stages.2': [(1, 4, 4, 10), (1, 4, 4, 10)],
        'stages.2.1': [(1, 4, 4, 10), (1, 4, 4, 10)],
    }
    torch.testing.assert_close(outputs[1], model.norm1.bias[:, None, None].expand(8, 8, 8)[None])


@pytest.mark.parametrize('layer', ['mlp.fc2', 'attn.att.2'])
def test_activations_and_their_gradients(layer):
    """As Grad-CAM takes them: the gradient is that of the loss for what the layer returned."""
    model = build().eval()
    watched = model.stages[3][-1].get_submodule(layer)
    taken = {}

    def take(module, inputs, output):
        taken['activation'] = output.detach()
        output.register_hook(lambda grad: taken.update(gradient=grad))

    handle = watched.register_forward_hook(take)
    loss_of(model(X)).backward()
    handle.remove()
    activation, gradient = taken['activation'], taken['gradient']
    assert activation.shape == gradient.shape == (1, 2, 2, watched.out_channels)
    direction = torch.randn(activation.shape, dtype=torch.double)

    def loss_at(step):
        handle = watched.register_forward_hook(lambda m, i, o: o + step * direction)
        with torch.no_grad():
            loss = loss_of(model(X))
        handle.remove()
        return loss

    slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_a_count_by_hooks_is_complete():
    """As profilers count that know layers by their classes."""
    model = build(out_norm=False).eval()
    count = 0

    def add(layer, inputs, output):
        nonlocal count
        count += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(add)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(X)
    assert 2 * count == counter.get_total_flops()


def test_a_hook_within_a_checkpointed_block(fast):
    """It is called again when the block is recomputed, that on the block itself is not."""
    model = build(with_cp=True)
    calls = []
    block = model.stages[1][0]
    block.register_forward_hook(lambda *_: calls.append('block'))
    block.mlp.fc2.register_forward_hook(lambda *_: calls.append('fc2'))
    state = leaves(model)
    compare(model, model(X), plain_outputs(model, X, state), state, 1e-12, 1e-10)
    assert sorted(calls) == ['block', 'fc2', 'fc2']
    assert len(fast) == 2 * (BLOCKS - 1)


PAGE = ROOT / 'docs/use_in_your_config.md'
EXAMPLES = [b for b in read_blocks(PAGE) if b.language == 'python' and b.file_name is None]


@pytest.mark.parametrize('example', EXAMPLES, ids=lambda block: block.name)
def test_examples_of_the_page(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pretrain').mkdir()
    torch.save(Conv2Former('tiny', out_norm=False).state_dict(), 'pretrain/conv2former_t.pth')
    names = {}
    exec(compile(example.text, PAGE.name, 'exec'), names)
    if example.name == 'plain':
        shapes = [(1, channels, 224 // s, 224 // s) for channels, s in
                  zip((72, 144, 288, 576), (4, 8, 16, 32))]  # fmt: skip
        assert [tuple(feature.shape) for feature in names['features']] == shapes
    elif example.name == 'hooks':
        assert capsys.readouterr().out == 'torch.Size([1, 7, 7, 576])\n'
    else:
        layer = DepthwiseConv(4, 3)
        layer.total_ops = 0
        names['custom_ops'][DepthwiseConv](layer, (), torch.zeros(1, 5, 6, 4))
        assert layer.total_ops == 5 * 6 * 4 * 9


# ------------------------------------------------------------------------ which blocks stay fast
class LoRA(nn.Module):
    """A layer with an addition of low rank, as adapters have it: without a weight of its own."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_channels, rank, bias=False).double()
        self.up = nn.Linear(rank, base.out_channels, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    @property
    def weight(self):
        return self.base.weight + (self.up.weight @ self.down.weight)[..., None, None]


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def patch(layer):
    real = layer.forward
    layer.forward = lambda x: 2 * real(x)


ATTACHMENTS = {
    'forward hook': lambda b: b.mlp.fc1.register_forward_hook(ignore),
    'forward hook on a half': lambda b: b.attn.register_forward_hook(ignore),
    'forward hook on drop path': lambda b: b.drop_path.register_forward_hook(ignore),
    'pre-hook': lambda b: b.attn.norm.register_forward_pre_hook(ignore),
    'backward hook': lambda b: b.attn.att[2].register_full_backward_hook(ignore),
    'backward pre-hook': lambda b: b.attn.v.register_full_backward_pre_hook(ignore),
    'wrapper': lambda b: setattr(b.mlp, 'fc1', LoRA(b.mlp.fc1)),
    'wrapper of a half': lambda b: setattr(b, 'attn', nn.Sequential(b.attn)),
    'patched forward': lambda b: patch(b.mlp.pos),
    'parametrization': lambda b: parametrize.register_parametrization(
        b.attn.proj, 'weight', Negated()
    ),
    'parametrized layer scale': lambda b: parametrize.register_parametrization(
        b, 'layer_scale_1', Negated()
    ),
    'weight norm': lambda b: nn.utils.weight_norm(b.mlp.fc2),
    'spectral norm': lambda b: nn.utils.spectral_norm(b.mlp.fc2),
    'pruning': lambda b: prune.l1_unstructured(b.mlp.fc1, 'weight', 0.5),
    'another activation': lambda b: setattr(b.mlp, 'act', nn.ReLU()),
    'GELU by tanh': lambda b: setattr(b.mlp, 'act', nn.GELU('tanh')),
    'another epsilon': lambda b: setattr(b.attn.norm, 'eps', 1e-2),
    'no bias': lambda b: setattr(b.mlp.fc1, 'bias', None),
    'another layer behind': lambda b: b.attn.att.append(nn.Tanh()),
}


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('attachment', ATTACHMENTS)
def test_only_that_block_runs_layer_by_layer(attachment, fast):
    """The values are those of the layers one by one."""
    model = build().eval()
    block = model.stages[2][1]
    ATTACHMENTS[attachment](block)
    blocks = [b for b in model.modules() if isinstance(b, Block) and b is not block]
    others = {id(b.mlp.norm.weight) for b in blocks}
    with torch.no_grad():
        model(X)
        assert {id(parameters.norm_2_weight) for parameters in fast} == others
    fast.clear()
    outputs = model(X)
    assert {id(parameters.norm_2_weight) for parameters in fast} == others
    loss_of(outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    fast.clear()
    handle = register_module_forward_hook(ignore)
    torch.testing.assert_close(model(X), outputs, rtol=1e-10, atol=1e-10)
    handle.remove()
    assert not fast


# -------------------------------------------------------------------------------- derived weights
PARAMETRIZATIONS = {
    'own': lambda layer: parametrize.register_parametrization(layer, 'weight', Negated()),
    'weight_norm': nn.utils.parametrizations.weight_norm,
    'spectral_norm': nn.utils.parametrizations.spectral_norm,
    'old weight_norm': nn.utils.weight_norm,
    'old spectral_norm': nn.utils.spectral_norm,
    'pruning': lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
    'low-rank adapter': LoRA,
    'none any more': lambda layer: prune.remove(
        prune.random_unstructured(layer, 'weight', 0.5), 'weight'
    ),
}
POINTWISE, DEPTHWISE = ('mlp.fc1', 'attn.proj'), ('attn.att.2',)
PATHS = [(name, path) for name in PARAMETRIZATIONS
         for path in POINTWISE + DEPTHWISE * (name != 'low-rank adapter')]  # fmt: skip


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize(('name', 'path'), PATHS)
def test_derived_weights(name, path, fast):
    """Their parameters get the plain network's gradient of the weight, by the chain rule."""
    model = build()
    weight_name = f'stages.2.0.{path}.weight'
    state = leaves(model)
    parent, _, last = f'stages.2.0.{path}'.rpartition('.')
    plain = model.get_submodule(f'{parent}.{last}')
    layer = PARAMETRIZATIONS[name](plain)
    setattr(model.get_submodule(parent), last, layer)
    model.eval()
    outputs = model(X)
    assert len(fast) == BLOCKS - (name != 'none any more')
    state[weight_name] = layer.weight.detach().clone().requires_grad_()
    expected = plain_outputs(model, X, state)
    for found, value in zip(outputs, expected):
        assert relative_error(found, value) < 1e-12
    loss_of(outputs).backward()
    loss_of(expected).backward()
    own = {n: p for n, p in layer.named_parameters() if 'bias' not in n and p.requires_grad}
    found = {n: p.grad.clone() for n, p in own.items()}
    layer(torch.zeros(1, 4, 4, plain.in_channels, dtype=torch.double))  # old kinds compute
    wanted = torch.autograd.grad(layer.weight, [*own.values()], state[weight_name].grad)
    for (part, value), reference in zip(found.items(), wanted):
        assert relative_error(value, reference) < 1e-10, part
    other = 'stages.2.1.mlp.fc1.weight'
    assert relative_error(model.get_parameter(other).grad, state[other].grad) < 1e-10


def replica_of(model):
    """As `torch.nn.parallel.replicate` makes them for `nn.DataParallel`: without parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module.named_children():
            setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    return copies[model]


def test_replicas_of_data_parallel():
    model = build().eval()
    state = leaves(model)
    expected = plain_outputs(model, X, state)
    compare(model, replica_of(model)(X), expected, state, 1e-12, 1e-10)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize('precision', ['float64', 'autocast'])
def test_other_norms(precision):
    """Torch's own, or none, instead of those outside of blocks."""
    model = build().eval()
    expected = [output.permute(0, 2, 3, 1) for output in model(X)]
    expected[1] = model.norm1(2 * expected[1])
    model.norm1 = nn.Sequential(model.norm1, Doubled(), model.norm1)
    for i in range(1, 4):
        own = model.downsample_layers[i][0]
        other = nn.LayerNorm(own.normalized_shape, own.eps).double()
        other.load_state_dict(own.state_dict())
        model.downsample_layers[i][0] = other
    if precision == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            outputs = model.float()(X.float())
        tolerance = 0.1
    else:
        outputs, tolerance = model(X), 1e-12
    for output, value in zip(outputs, expected):
        assert output.is_contiguous()
        assert relative_error(output.double(), value.permute(0, 3, 1, 2)) < tolerance


# --------------------------------------------------------------- transforms, gradients of gradients
@pytest.mark.parametrize('transform', ['grad', 'functional_call'])
def test_parameters_of_one_call(transform, fast):
    """Gradients for other parameters than the module's, of `torch.func.grad` and of autograd."""
    model = build().eval()
    state = leaves(model)
    for name, _ in model.named_parameters():
        state[name] = (1.5 * state[name]).detach().requires_grad_()
    parameters = {n: state[n].detach().requires_grad_() for n, _ in model.named_parameters()}

    def loss(parameters):
        return loss_of(torch.func.functional_call(model, parameters, X))

    if transform == 'grad':
        found = torch.func.grad(loss)(parameters)
        assert not fast
    else:
        loss(parameters).backward()
        found = {name: parameter.grad for name, parameter in parameters.items()}
        assert len(fast) == BLOCKS
    loss_of(plain_outputs(model, X, state)).backward()
    for name, gradient in found.items():
        assert relative_error(gradient, state[name].grad) < 1e-10, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_torch_func_jvp():
    model = build().eval()
    state = {name: value.detach() for name, value in leaves(model).items()}
    tangent = (torch.randn_like(X),)
    _, found = torch.func.jvp(lambda x: model(x)[-1], (X,), tangent)
    _, expected = torch.func.jvp(lambda x: plain_outputs(model, x, state)[-1], (X,), tangent)
    assert relative_error(found, expected) < 1e-10


def test_forward_mode_of_autograd():
    model, tangent = build().eval(), torch.randn_like(X)
    _, expected = torch.func.jvp(lambda x: model(x)[-1], (X,), (tangent,))
    for is_enabled in (True, False):
        with torch.set_grad_enabled(is_enabled), forward_ad.dual_level():
            found = forward_ad.unpack_dual(model(forward_ad.make_dual(X, tangent))[-1]).tangent
        assert relative_error(found, expected) < 1e-10


def test_gradients_of_each_image():
    model = build().eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image):
        return loss_of(torch.func.functional_call(model, parameters, image[None]))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    for i, image in enumerate(X):
        for name, expected in torch.func.grad(loss)(parameters, image).items():
            assert relative_error(found[name][i], expected) < 1e-9, name


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_stage_in_a_wrapper():
    model = build().eval()
    expected = model(X)
    model.stages[0] = Wrapper(model.stages[0])
    for output, value in zip(model(X), expected, strict=True):
        assert relative_error(output, value) < 1e-10


def test_layer_added_to_a_downsampling():
    model = build().eval()
    model.downsample_layers[1].append(nn.Tanh())
    inputs = []
    model.stages[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(X)
    assert inputs[0].abs().max() <= 1


def second_gradients(function, parameters):
    """Gradients for the parameters of the squared gradient for the input, a gradient penalty."""
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(function(x)), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), parameters, allow_unused=True)


def test_gradients_of_gradients(fast):
    """With any hook, as docs/use_in_your_config.md says; without one there is an error."""
    model = build().eval()
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match='no gradients of gradients'):
        second_gradients(model, [*parameters.values()])
    state = leaves(model)
    plain = [state[name] for name in parameters]
    expected = second_gradients(lambda x: plain_outputs(model, x, state), plain)
    handle = register_module_forward_hook(ignore)
    fast.clear()
    found = second_gradients(model, [*parameters.values()])
    handle.remove()
    assert not fast
    for name, value, reference in zip(parameters, found, expected):
        assert (value is None) == (reference is None), name
        if value is not None and reference.norm() > 0:
            assert relative_error(value, reference) < 1e-9, name


@pytest.mark.skipif(not depthwise.is_interpreted(), reason='no Triton in its interpreter')
def test_gradients_of_gradients_of_norms(monkeypatch):
    """Of those outside of blocks, which no hook keeps from Triton's kernels."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    norm = blocks.LayerNorm(4).double()
    x = torch.randn(1, 1, 2, 4, dtype=torch.double, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.double, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        return torch.func.functional_call(norm, dict(weight=weight, bias=bias), (x,))

    assert 'LayerNormFunction' in function(x, weight, bias).grad_fn.name()
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
