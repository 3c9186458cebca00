"""What people attach to the network works: hooks, wrappers, parametrizations, transforms.

A block of which a layer is watched or exchanged runs layer by layer, all others by one function.
"""

import copy

import pytest
import torch
from common.plain_conv2former import plain_conv2former
from helpers import ROOT
from helpers.comparisons import SMALL_ARCHS, compare, leaves, loss_of, randomized, relative_error
from helpers.pages import read_blocks
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.models import blocks
from mmconv2former.models.blocks import Block
from mmconv2former.ops import DepthwiseConv, depthwise

ARCH = SMALL_ARCHS['kernels']  # of 1, 1, 2 and 1 blocks
BLOCKS = sum(ARCH['depths'])


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Plain blocks are computed by the function in any mode, not only where a CPU gains by it."""
    monkeypatch.setattr(blocks, 'is_worth_it', lambda x, recompute: True)


def build(**options):
    torch.manual_seed(0)
    return randomized(Conv2Former(ARCH, **options).double())


def image(batch=1):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, 64, 64, generator=generator, dtype=torch.double)


def layers_of(model):
    """All modules without parts, by name."""
    return {name: m for name, m in model.named_modules() if not [*m.children()]}


@pytest.fixture
def fast(monkeypatch):
    """Gets an entry for each block that runs as one function."""
    calls = []
    real = blocks.compute_block
    monkeypatch.setattr(blocks, 'compute_block', lambda *a: calls.append(a) or real(*a))
    return calls


# ------------------------------------------------------------------------------------------ hooks
@pytest.mark.parametrize('name', ['tiny', 'isotropic'])
@pytest.mark.parametrize('mode', ['training', 'inference'])
def test_hooks_on_every_module_are_called(name, mode):
    torch.manual_seed(0)
    model = Conv2FormerIsotropic() if name == 'isotropic' else Conv2Former()
    model.train(mode == 'training')
    modules = dict(model.named_modules())
    modules = {n: m for n, m in modules.items() if not isinstance(m, nn.ModuleList)}
    assert len(modules) > 250
    called = {'forward': set(), 'before': set(), 'backward': set()}
    for part, module in modules.items():
        module.register_forward_hook(lambda *_, n=part: called['forward'].add(n))
        module.register_forward_pre_hook(lambda *_, n=part: called['before'].add(n))
        module.register_full_backward_hook(lambda *_, n=part: called['backward'].add(n))
    with torch.set_grad_enabled(mode == 'training'):
        outputs = model(torch.randn(1, 3, 64, 64))
    assert called['forward'] == called['before'] == set(modules)
    if mode == 'training':
        loss_of(outputs).backward()
        assert called['backward'] == set(modules)


@pytest.mark.parametrize('recompute', ['nothing', 'elementwise'])
def test_hooks_change_nothing_but_the_way(recompute, fast):
    """Values and gradients are those of the plain network, with hooks on all layers and without."""
    model = build(recompute=recompute).eval()
    state = leaves(model)
    expected = plain_conv2former(image(), state, model.depths)
    model(image())
    assert len(fast) == BLOCKS
    fast.clear()
    seen = {}
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda m, i, output, n=name: seen.update({n: output.shape[-1]}))
    compare(model, model(image()), expected, state, 1e-12, 1e-10)
    assert not fast
    assert seen['stages.2.1.mlp.fc1'] == 40


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('mode', ['training', 'inference'])
def test_hooks_on_stages(mode, with_cp, fast):
    """They see (N, H, W, C) and may change it; the blocks stay as fast as they were."""
    model = build(with_cp=with_cp).train(mode == 'training')
    shapes = {}

    def hook(module, inputs, output):
        shapes[names[module]] = [tuple(inputs[0].shape), tuple(output.shape)]
        return 0 * output if names[module] == 'stages.1' else None

    parts = ['stages.0', 'stages.1', 'downsample_layers.2', 'stages.2', 'stages.2.1']
    names = {model.get_submodule(name): name for name in parts}
    for module in names:
        module.register_forward_hook(hook)
    with torch.set_grad_enabled(mode == 'training'):
        outputs = model(image())
    assert len(fast) == BLOCKS
    assert shapes == {
        'stages.0': [(1, 16, 16, 6), (1, 16, 16, 6)],
        'stages.1': [(1, 8, 8, 8), (1, 8, 8, 8)],
        'downsample_layers.2': [(1, 8, 8, 8), (1, 4, 4, 10)],
        'stages.2': [(1, 4, 4, 10), (1, 4, 4, 10)],
        'stages.2.1': [(1, 4, 4, 10), (1, 4, 4, 10)],
    }
    torch.testing.assert_close(outputs[1], model.norm1.bias[:, None, None].expand(8, 8, 8)[None])


@pytest.mark.parametrize('layer', ['mlp.fc2', 'attn.proj', 'attn.att.2'])
def test_activations_and_their_gradients(layer):
    """As Grad-CAM takes them: the gradient is that of the loss for what the layer returned."""
    model = build().eval()
    watched = model.stages[3][-1].get_submodule(layer)
    taken = {}

    def take(module, inputs, output):
        taken['activation'] = output.detach()
        output.register_hook(lambda grad: taken.update(gradient=grad))

    handle = watched.register_forward_hook(take)
    loss_of(model(image())).backward()
    handle.remove()
    activation, gradient = taken['activation'], taken['gradient']
    channels = watched.out_channels
    assert activation.shape == gradient.shape == (1, 2, 2, channels)

    direction = torch.randn(activation.shape, dtype=torch.double)

    def loss_at(step):
        handle = watched.register_forward_hook(lambda m, i, o: o + step * direction)
        with torch.no_grad():
            loss = loss_of(model(image()))
        handle.remove()
        return loss

    slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_full_backward_hooks_get_gradients():
    model = build()
    found = {}
    fc2 = model.stages[1][0].mlp.fc2
    fc2.register_full_backward_hook(lambda m, inner, outer: found.update(inner=inner, outer=outer))
    fc2.register_full_backward_pre_hook(lambda m, outer: found.update(first=outer))
    loss_of(model(image())).backward()
    assert torch.equal(found['first'][0], found['outer'][0])
    torch.testing.assert_close(fc2.bias.grad, found['outer'][0].sum((0, 1, 2)))
    torch.testing.assert_close(found['inner'][0], found['outer'][0] @ fc2.weight.flatten(1))


def test_a_count_by_hooks_is_complete():
    """As profilers do it that know layers by their classes."""
    model = Conv2Former('nano', out_norm=False).eval()
    count = 0

    def add(layer, inputs, output):
        nonlocal count
        count += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(add)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * count == counter.get_total_flops()


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


# ----------------------------------------------------------------------------- which way is taken
class LoRA(nn.Module):
    """A layer with an addition of low rank, as adapters have it: without a weight of its own."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_channels, rank, bias=False).double()
        self.up = nn.Linear(rank, base.out_channels, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def ignore(*_):
    """A hook."""


def patch(layer):
    real = layer.forward
    layer.forward = lambda x: 2 * real(x)


ATTACHMENTS = {
    'forward hook': lambda b: b.mlp.fc1.register_forward_hook(ignore),
    'forward hook with keywords': lambda b: b.mlp.act.register_forward_hook(
        lambda *_: None, with_kwargs=True
    ),
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
@pytest.mark.parametrize('mode', ['training', 'inference'])
@pytest.mark.parametrize('attachment', ATTACHMENTS)
def test_only_the_watched_block_runs_layer_by_layer(attachment, mode, fast):
    model = build().train(mode == 'training')
    block = model.stages[2][1]
    ATTACHMENTS[attachment](block)
    outside = [b for b in model.modules() if isinstance(b, Block) and b is not block]
    with torch.set_grad_enabled(mode == 'training'):
        outputs = model(image())
    used = {id(call[2].scale_1) for call in fast}
    assert used == {id(b.layer_scale_1) for b in outside}
    if mode == 'training':
        loss_of(outputs).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None or not parameter.requires_grad, name


def test_a_removed_hook_leaves_the_fast_way(fast):
    model = build()
    handle = model.stages[0][0].mlp.fc1.register_forward_hook(ignore)
    model(image())
    assert len(fast) == BLOCKS - 1
    handle.remove()
    fast.clear()
    model(image())
    assert len(fast) == BLOCKS


def test_a_hook_on_all_modules(fast):
    model = build()
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    model(image())
    handle.remove()
    assert not fast
    assert set(layers_of(model).values()) <= set(seen)


def test_a_hook_within_a_checkpointed_block(fast):
    """It is called again when the block is computed again, that on the block itself is not."""
    model = build(with_cp=True)
    calls = []
    block = model.stages[1][0]
    block.register_forward_hook(lambda *_: calls.append('block'))
    block.mlp.fc2.register_forward_hook(lambda *_: calls.append('fc2'))
    state = leaves(model)
    expected = plain_conv2former(image(), state, model.depths, training=True)
    compare(model, model(image()), expected, state, 1e-12, 1e-10)
    assert sorted(calls) == ['block', 'fc2', 'fc2']
    assert len(fast) == 2 * (BLOCKS - 1)


def test_patched_forward_is_respected():
    model = build().eval()
    state = leaves(model)
    patch(model.stages[2][0].mlp.fc2)
    for part in ('weight', 'bias'):
        name = f'stages.2.0.mlp.fc2.{part}'
        state[name] = (2 * state[name]).detach().requires_grad_()
    for found, expected in zip(model(image()), plain_conv2former(image(), state, model.depths)):
        assert relative_error(found, expected) < 1e-12


def test_other_settings_of_a_layer_are_respected():
    """The class of a layer does not say all of it."""
    model = build().eval()
    for attachment in ('GELU by tanh', 'another epsilon'):
        changed = copy.deepcopy(model)
        ATTACHMENTS[attachment](changed.stages[0][0])
        watched = copy.deepcopy(changed)
        for layer in layers_of(watched).values():
            layer.register_forward_hook(ignore)
        expected = watched(image())[0]
        torch.testing.assert_close(changed(image())[0], expected, rtol=1e-10, atol=1e-10)
        assert relative_error(model(image())[0], expected) > 1e-6


# ----------------------------------------------------------------------- wrapped and made weights
@pytest.mark.parametrize('path', ['mlp.fc1', 'mlp.fc2', 'attn.v', 'attn.proj', 'attn.att.0'])
def test_low_rank_adapter(path):
    """Values and gradients are those of the plain network with the sum of both weights."""
    model = build().eval()
    block = model.stages[2][1]
    parent, _, last = path.rpartition('.')
    lora = LoRA(block.get_submodule(path))
    setattr(block.get_submodule(parent), last, lora)
    weight_name = f'stages.2.1.{path}.weight'
    state = {name.replace('.base', ''): value for name, value in leaves(model).items()}
    total = lora.base.weight.flatten(1) + lora.up.weight @ lora.down.weight
    state[weight_name] = total.detach().view_as(lora.base.weight).requires_grad_()
    outputs, expected = model(image()), plain_conv2former(image(), state, model.depths)
    for found, value in zip(outputs, expected):
        assert relative_error(found, value) < 1e-12
    loss_of(outputs).backward()
    loss_of(expected).backward()
    of_total = state[weight_name].grad.flatten(1)
    assert relative_error(lora.up.weight.grad, of_total @ lora.down.weight.T) < 1e-10
    assert relative_error(lora.down.weight.grad, lora.up.weight.T @ of_total) < 1e-10
    assert lora.base.weight.grad is None
    other = 'stages.2.0.mlp.fc1.weight'
    assert relative_error(model.get_parameter(other).grad, state[other].grad) < 1e-10


PARAMETRIZATIONS = {
    'own': lambda layer: parametrize.register_parametrization(layer, 'weight', Negated()),
    'weight_norm': nn.utils.parametrizations.weight_norm,
    'spectral_norm': nn.utils.parametrizations.spectral_norm,
    'old weight_norm': nn.utils.weight_norm,
    'old spectral_norm': nn.utils.spectral_norm,
    'pruning': lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
}


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('path', ['mlp.fc1', 'mlp.pos', 'attn.proj', 'attn.att.2'])
@pytest.mark.parametrize('name', PARAMETRIZATIONS)
def test_parametrized_weights(name, path):
    """Their parameters get the gradients of the plain network, passed on through what they are."""
    model = build()
    state = leaves(model)
    layer = model.stages[2][0].get_submodule(path)
    PARAMETRIZATIONS[name](layer)
    model.eval()
    outputs = model(image())
    weight_name = f'stages.2.0.{path}.weight'
    state[weight_name] = layer.weight.detach().clone().requires_grad_()
    expected = plain_conv2former(image(), state, model.depths)
    for found, value in zip(outputs, expected):
        assert relative_error(found, value) < 1e-12
    loss_of(outputs).backward()
    loss_of(expected).backward()
    own = {n: p for n, p in layer.named_parameters() if n != 'bias'}
    found = {n: p.grad.clone() for n, p in own.items()}
    layer(torch.zeros(1, 4, 4, layer.in_channels, dtype=torch.double))  # makes old kinds compute
    wanted = torch.autograd.grad(layer.weight, [*own.values()], state[weight_name].grad)
    for (part, value), reference in zip(found.items(), wanted):
        assert relative_error(value, reference) < 1e-10, part
    assert relative_error(layer.bias.grad, state[f'stages.2.0.{path}.bias'].grad) < 1e-10


def test_parametrized_layer_scale():
    """It is of the block itself."""
    model = build().eval()
    block = model.stages[2][0]
    state = leaves(model)
    parametrize.register_parametrization(block, 'layer_scale_1', Negated())
    name = 'stages.2.0.layer_scale_1'
    state[name] = (-state[name]).detach().requires_grad_()
    outputs, expected = model(image()), plain_conv2former(image(), state, model.depths)
    assert relative_error(outputs[-1], expected[-1]) < 1e-12
    loss_of(outputs).backward()
    loss_of(expected).backward()
    own = block.parametrizations.layer_scale_1.original.grad
    assert relative_error(-own, state[name].grad) < 1e-10


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
    expected = plain_conv2former(image(), state, model.depths)
    compare(model, replica_of(model)(image()), expected, state, 1e-12, 1e-10)


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('path', ['mlp.fc1', 'attn.norm'])
def test_weights_that_were_parametrized(path, fast):
    """Undoing it leaves the weight behind the bias in the module's own order."""
    model = build().eval()
    layer = model.stages[2][0].get_submodule(path)
    prune.random_unstructured(layer, 'weight', 0.5)
    prune.remove(layer, 'weight')
    assert [*layer._parameters] == ['bias', 'weight']
    state = leaves(model)
    expected = plain_conv2former(image(), state, model.depths)
    compare(model, model(image()), expected, state, 1e-12, 1e-10)
    assert len(fast) == BLOCKS


@pytest.mark.parametrize('precision', ['float64', 'autocast'])
def test_other_norms(precision):
    """Torch's own, or none, in the place of those outside of blocks."""
    model = build().eval()
    expected = [output.permute(0, 2, 3, 1) for output in model(image())]
    expected[1] = model.norm1(2 * expected[1])
    wrapped = model.norm1
    model.norm1 = nn.Sequential(model.norm1, Doubled(), wrapped)
    for i in range(1, 4):
        own = model.downsample_layers[i][0]
        other = nn.LayerNorm(own.normalized_shape, own.eps).double()
        other.load_state_dict(own.state_dict())
        model.downsample_layers[i][0] = other
    if precision == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            outputs = model.float()(image().float())
        tolerance = 0.1
    else:
        outputs, tolerance = model(image()), 1e-12
    for output, value in zip(outputs, expected):
        assert output.is_contiguous()
        assert relative_error(output.double(), value.permute(0, 3, 1, 2)) < tolerance


# --------------------------------------------------------------- transforms, gradients of gradients
def test_torch_func_grad():
    model = build().eval()
    state = leaves(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda p: loss_of(torch.func.functional_call(model, p, image())))(
        parameters
    )
    loss_of(plain_conv2former(image(), state, model.depths)).backward()
    for name, gradient in found.items():
        assert relative_error(gradient, state[name].grad) < 1e-10, name


def test_functional_call(fast):
    """Other parameters for one call, by the fast way, with gradients for them alone."""
    model = build().eval()
    other = leaves(model)
    parameters = {
        n: (1.5 * other[n]).detach().requires_grad_() for n, _ in model.named_parameters()
    }
    state = other | {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    loss_of(torch.func.functional_call(model, parameters, image())).backward()
    assert len(fast) == BLOCKS
    loss_of(plain_conv2former(image(), state, model.depths)).backward()
    for name, parameter in parameters.items():
        assert relative_error(parameter.grad, state[name].grad) < 1e-10, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_torch_func_jvp():
    model = build().eval()
    state = {name: value.detach() for name, value in leaves(model).items()}
    tangent = torch.randn_like(image())
    _, found = torch.func.jvp(lambda x: model(x)[-1], (image(),), (tangent,))
    _, expected = torch.func.jvp(
        lambda x: plain_conv2former(x, state, model.depths)[-1], (image(),), (tangent,)
    )
    assert relative_error(found, expected) < 1e-10


def second_gradients(function, parameters):
    """Gradients for the parameters of the squared gradient for the input, a gradient penalty."""
    x = image().requires_grad_()
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
    expected = second_gradients(lambda x: plain_conv2former(x, state, model.depths), plain)
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
    x = torch.randn(1, 2, 3, 4, dtype=torch.double, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.double, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        return torch.func.functional_call(norm, dict(weight=weight, bias=bias), (x,))

    assert 'LayerNormFunction' in function(x, weight, bias).grad_fn.name()
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
