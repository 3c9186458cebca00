"""CUDA graphs without a GPU: a stand-in records the operators of a capture and replays them.

As with real graphs, a replay reads and writes the tensors of the capture, whatever happened to them
since. `test_gpu.py` has the same on a GPU.
"""

import copy
import pickle

import pytest
import torch
from common import inference
from helpers.comparisons import randomized
from helpers.in_process import load_tool, refusal_of, with_data, write_tiny_config
from helpers.simulated_graphs import StandIn, tree_leaves
from helpers.tiny import scalars
from mmengine.utils import digit_version
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerIsotropic, use_cuda_graphs
from mmconv2former.engine import cuda_graphs
from mmconv2former.engine.cuda_graphs import VaryingSizeError
from mmconv2former.ops.dispatch import is_autocast_enabled

# Arguments of torch.export, which cannot follow a replaced `forward` before torch 2.4.
HAS_STRICT = digit_version(torch.__version__) >= digit_version('2.4')
EXPORTS = [dict(strict=False), dict(strict=True)] if HAS_STRICT else []
ARCH = dict(channels=(8, 12), depths=(1, 2), kernel_size=5)


def build(**options):
    torch.manual_seed(0)
    return randomized(Conv2Former(ARCH, out_indices=(0, 1), **options)).eval()


def isotropic():
    torch.manual_seed(0)
    return Conv2FormerIsotropic(dict(channels=8, depth=2), layer_scale_init_value=1.0).eval()


class Small(nn.Module):
    """Dropout, BatchNorm, outputs in a dict, an unused and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return dict(features=[torch.dropout(y, 0.3, self.training)], mean=self.frozen * x.mean())


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(outputs, expected):
    outputs, expected = tree_leaves(outputs), tree_leaves(expected)
    assert len(outputs) == len(expected) > 0
    for value, reference in zip(outputs, expected):
        assert value.dtype == reference.dtype
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- inference
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    'make', [build, lambda: build().switch_to_deploy(), isotropic, lambda: Small().eval()]
)
def test_replays_compute_what_the_network_does(make, mode, simulated):
    model = make()
    plain = copy.deepcopy(model)
    assert use_cuda_graphs(model) is model
    first, second = images(2, 3, 64, 64), images(2, 3, 64, 64, seed=2)
    with mode():
        kept = model(first)
        assert_equal(model(second), plain(second))
        assert_equal(kept, plain(first))  # not overwritten by the later call
    assert (StandIn.made, StandIn.replays) == (1, 2)
    with torch.no_grad():  # also if the graph was captured in inference mode
        assert_equal(model(first), plain(first))


def test_other_calls_run_without_graphs(simulated, monkeypatch):
    model = build()
    plain = copy.deepcopy(model)
    use_cuda_graphs(model)
    x = images(1, 3, 32, 32)
    outputs = model(x)
    assert outputs[0].requires_grad
    assert_equal(outputs, plain(x))
    assert_equal(model.train()(x), plain.train()(x))
    with torch.no_grad():
        assert_equal(model(x), plain(x))
        small = use_cuda_graphs(Small().eval())
        found = torch.func.vmap(small)(x[None])
        assert_equal([value[0] for value in tree_leaves(found)], small.forward.plain(x))
        with StandIn():  # as an example of a dispatch mode
            model.eval()(x)
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        assert_equal(model(x), plain.eval()(x))
    assert StandIn.replays == 0


def test_compilers_and_exporters_see_the_network_without_graphs(monkeypatch):
    model = build()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, 'is_available', lambda: True)
            use_cuda_graphs(model)
        with pytest.raises(RuntimeError, match='on cpu'):
            model(x)
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        assert_equal(compiled(x), expected)
        for options in EXPORTS:
            assert_equal(torch.export.export(model, (x,), **options).module()(x), expected)
        assert_equal(torch.jit.trace(model, x, check_trace=False)(x), expected)


def test_copies_have_no_graphs(simulated):
    model = use_cuda_graphs(build())
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        others.append(copy.deepcopy(others[0]))
        for other in others:
            for parameter in other.parameters():
                parameter.zero_()
            assert not any(output.any() for output in other(x))  # of its own weights
        assert_equal(model(x), expected)
    assert StandIn.replays == 2


def test_a_graph_for_each_precision(simulated):
    model = build()
    plain = copy.deepcopy(model)
    use_cuda_graphs(model)
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(2):
            assert_equal(model(x), plain(x))
            # Entered again, as autocast drops its cached casts at the end.
            with torch.autocast('cpu', torch.bfloat16):
                for seed in (1, 2):
                    found, expected = (
                        network(images(1, 3, 32, 32, seed=seed)) for network in (model, plain)
                    )
                    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
            assert not is_autocast_enabled('cpu')
    assert StandIn.made == 2


def test_autocast_keeps_no_casts_during_a_capture(simulated, monkeypatch):
    model = nn.Conv2d(3, 4, 3).eval()
    seen = []

    def forward(x):
        seen.append(torch.is_autocast_cache_enabled())
        return nn.Conv2d.forward(model, x)

    monkeypatch.setattr(model, 'forward', forward)
    use_cuda_graphs(model)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        model(images(1, 3, 8, 8))
        assert torch.is_autocast_cache_enabled()
    assert seen == [False] * (cuda_graphs.WARM_UP_CALLS + 1)


@torch.no_grad()
def test_other_sizes_are_refused(simulated):
    model = use_cuda_graphs(build())
    plain = copy.deepcopy(model)
    model(images(2, 3, 32, 64))
    for shape in [(2, 3, 64, 32), (2, 3, 32, 65), (3, 3, 32, 64), (1, 3, 64, 64)]:
        with pytest.raises(VaryingSizeError, match='one size') as error:
            model(images(*shape))
        assert f'captured for (2, 3, 32, 64), got {shape}' in str(error.value)
        assert 'keep_ratio=False' in str(error.value)
    last = images(1, 3, 32, 64)  # of a data set with an odd number of images
    assert_equal(model(last), plain(last))
    assert (StandIn.made, StandIn.replays) == (1, 1)
    with torch.autocast('cpu', torch.bfloat16):  # has a graph of its own
        model(images(1, 3, 64, 64))
    assert (StandIn.made, StandIn.replays) == (2, 2)


def assign(model):
    model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()}, assign=True)


def replace(model):
    model.norm1 = copy.deepcopy(model.norm0)
    model.norm1 = nn.LayerNorm(12)


def write_one(model):
    model.stages[1][1].mlp.fc1.weight.mul_(2)


def write_buffer(model):
    next(model.buffers()).add_(1)  # a mean of the stem's BatchNorm


CHANGES = {
    'assigned': assign,
    'one written': write_one,
    'a buffer written': write_buffer,
    'a module replaced': replace,
    'moved': nn.Module.double,
    'deployed': Conv2Former.switch_to_deploy,
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changed_weights_are_captured_again(change, simulated):
    model = use_cuda_graphs(build())
    x = images(1, 3, 32, 32)
    model(x)
    model(x)
    assert StandIn.made == 1
    change(model)
    x = x.to(model.norm0.weight.dtype)
    plain = copy.deepcopy(model)
    for _ in range(2):
        assert_equal(model(x), plain(x))
    assert StandIn.made == 2


@torch.no_grad()
def test_memory_that_a_graph_reads_is_kept(simulated):
    """Otherwise another tensor could get the address of a weight and look like it."""
    model = use_cuda_graphs(nn.Linear(3, 4).eval())
    address = model.weight.data_ptr()
    casts = []
    for dtype in (torch.float32, torch.bfloat16):
        model.cast = [torch.zeros(5)]  # as in a network that keeps its last cast only
        casts.append(model.cast[0].data_ptr())
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(images(2, 3))
    model.weight.data, model.cast = torch.zeros(4, 3), None
    for (_, weights), cast in zip(model.forward.graphs.values(), casts):
        assert {address, cast} <= {tensor.data_ptr() for tensor in weights.kept}


# ----------------------------------------------------------------------------------------- training
def step(model, x, optimizer=None):
    """Loss, and gradients by name."""
    outputs = [output for output in tree_leaves(model(x)) if output.requires_grad]
    loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if optimizer is not None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize(
    'make',
    [
        lambda: build(drop_path_rate=0.5),
        lambda: build(drop_path_rate=0.5, frozen_stages=1, recompute='nothing'),
        Small,
    ],
)
def test_training_is_the_same(make, simulated):
    """Losses, weights, BatchNorm's statistics and random numbers, step by step."""
    plain = make().train()
    model = use_cuda_graphs(copy.deepcopy(plain), inference=False, training=True)
    optimizers = [torch.optim.AdamW(network.parameters(), 0.01) for network in (plain, model)]
    for number in range(3):
        x = images(2, 3, 32, 32, seed=number)
        found = []
        for network, optimizer in zip((plain, model), optimizers):
            torch.manual_seed(number)
            found.append((*step(network, x, optimizer), torch.rand(1)))
        assert_equal(found[1], found[0])
        assert found[1][1].keys() == found[0][1].keys()
        assert_equal(model.state_dict(), plain.state_dict())
    assert (StandIn.made, StandIn.replays) == (2, 6)
    with torch.no_grad():  # as in a validation
        assert_equal(model.eval()(x), plain.eval()(x))
    assert StandIn.replays == 6


def test_gradients_are_accumulated(simulated):
    plain = build().train()
    model = use_cuda_graphs(copy.deepcopy(plain), training=True)
    first = step(model, images(2, 3, 32, 32))[1]
    kept = {name: grad.clone() for name, grad in first.items()}
    model.zero_grad()
    step(model, images(2, 3, 32, 32, seed=2))
    assert_equal(first, kept)
    step(model, images(2, 3, 32, 32, seed=3))
    for seed in (2, 3):
        step(plain, images(2, 3, 32, 32, seed=seed))
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    for parameter in model.parameters():
        parameter.grad.zero_()  # `zero_grad(set_to_none=False)`
    plain.zero_grad()
    for network in (model, plain):
        step(network, images(2, 3, 32, 32))
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_unused_outputs_and_outputs_of_an_earlier_step(simulated):
    model = use_cuda_graphs(build().train(), training=True)
    first = model(images(2, 3, 32, 32))
    kept = [output.detach().clone() for output in first]
    first[0].sum().backward()
    assert not model.norm1.weight.grad.any()  # zeros: only the unused output depends on it
    assert model.norm0.weight.grad.any()
    model(images(2, 3, 32, 32, seed=2))
    assert_equal(first, kept)


def test_one_backward_pass_after_each_forward_pass(simulated):
    model = use_cuda_graphs(build().train(), training=True)
    loss = model(images(2, 3, 32, 32))[0].sum()
    other = model(images(2, 3, 32, 32))[0].sum()
    with pytest.raises(RuntimeError, match='call backward once after each call of the network'):
        loss.backward()
    other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='call backward once after each call of the network'):
        other.backward()


def test_training_and_inference_may_have_different_sizes(simulated):
    model = use_cuda_graphs(build(), training=True)
    model.train()(images(2, 3, 32, 32))
    with torch.no_grad():
        model.eval()(images(1, 3, 64, 64))
    with pytest.raises(VaryingSizeError, match=r'for \(2, 3, 32, 32\), got \(2, 3, 64, 64\)'):
        model.train()(images(2, 3, 64, 64))
    assert StandIn.made == 3


def test_frozen_parameters_are_captured_again(simulated):
    model = use_cuda_graphs(build().train(), training=True)
    x = images(2, 3, 32, 32)
    step(model, x)
    model.stages[0].requires_grad_(False)
    model.zero_grad()
    assert not any(name.startswith('stages.0') for name in step(model, x)[1])
    assert StandIn.made == 4
    model.requires_grad_(False)
    assert not model(x)[0].requires_grad
    assert StandIn.made == 4


# ------------------------------------------------------------------------------ hook and refusals
def test_refusals(simulated, monkeypatch):
    with pytest.raises(ValueError, match='with_cp=False'):
        use_cuda_graphs(build(with_cp=True), training=True)
    use_cuda_graphs(build(with_cp=True))
    compiled = build()
    compiled.compile(backend='eager')
    with pytest.raises(RuntimeError, match='Conv2Former is compiled'):
        use_cuda_graphs(compiled)
    monkeypatch.setattr(cuda_graphs, 'is_distributed', lambda: True)
    with pytest.raises(RuntimeError, match='need a single process'):
        use_cuda_graphs(build(), training=True)
    use_cuda_graphs(build())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(RuntimeError, match='CUDA graphs need a CUDA device'):
        use_cuda_graphs(build())


def test_training_without_graphs_where_they_would_be_wrong(simulated):
    model = use_cuda_graphs(build(norm_eval=True).train(), training=True)
    x = images(2, 3, 32, 32).requires_grad_()
    model(x)[0].sum().backward()
    assert x.grad.any()
    scale = torch.func.grad(lambda scale: model(scale * x.detach())[0].sum())(torch.ones(()))
    assert scale != 0
    assert StandIn.replays == 0


@torch.no_grad()
def test_what_cannot_be_captured(simulated):
    class Waits(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    model = use_cuda_graphs(Waits().eval())
    with pytest.raises(RuntimeError, match=r'cannot capture Waits .*operation.*disable'):
        model(torch.ones(3))


# ------------------------------------------------------------------------------------------- tools
def test_option_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(load_tool('test'), 'get_device', lambda: 'cpu')
    expected = 'error: --cuda-graphs needs a CUDA device, the device is cpu'
    assert refusal_of('test', 'config.py', 'none', '--cuda-graphs') == expected
    options = ['--cuda-graphs', '--device', 'cpu', '--out', tmp_path]
    assert refusal_of('predict', 'config.py', 'none.pth', 'x.jpg', *options) == expected


def for_graphs_only(module, monkeypatch):
    """Lets only the `use_cuda_graphs` of a module see a CUDA device."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)

    def use(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, 'is_available', lambda: True)
            return use_cuda_graphs(*args, **kwargs)

    monkeypatch.setattr(module, 'use_cuda_graphs', use)


def test_training_of_a_recipe(simulated, sample, tmp_path, monkeypatch):
    """A segmentor's losses, with a validation in between, are those of a run without the hook."""
    for_graphs_only(cuda_graphs, monkeypatch)
    hooks = "custom_hooks = [dict(type='mmconv2former.CudaGraphsHook')]\n"
    found = []
    for more in ('', hooks):
        folder = tmp_path / f'run{len(found)}'
        folder.mkdir()
        config = write_tiny_config(folder / 'tiny.py', more=more)
        options = ['randomness.seed=0', 'model.backbone.drop_path_rate=0.5']
        assert refusal_of('train', *with_data([config], sample, folder, *options)) == ''
        found.append({key: value for key, value in scalars(folder).items() if 'loss' in key[0]})
    assert (StandIn.made, StandIn.replays) == (2, 8)
    assert {step for name, step in found[0] if name == 'loss'} == {1, 2, 3, 4}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_option_of_an_evaluation(simulated, sample, tmp_path, monkeypatch, capsys):
    """Images of one size, of varying sizes, and test-time augmentation."""
    for_graphs_only(inference, monkeypatch)
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')  # for the tool alone
    config = write_tiny_config(tmp_path / 'tiny.py')
    arguments = with_data([config, 'none', '--cuda-graphs'], sample, tmp_path)
    arguments.append('test_dataloader.dataset.indices=3')
    assert refusal_of('test', *arguments) == ''
    assert (StandIn.made, StandIn.replays) == (1, 3)
    resize = 'test_dataloader.dataset.pipeline.1'
    varying = [f'{resize}.type=RandomResize', f'{resize}.ratio_range=(1.0,3.0)']
    whole = ['model.test_cfg._delete_=True', 'model.test_cfg.mode=whole']
    refusal = refusal_of('test', *arguments, *varying, *whole)
    assert refusal.startswith('error: CUDA graphs need inputs of one size: captured')
    assert refusal_of('test', *arguments[:3], '--tta') == '2'  # argparse's exit
    assert '--cuda-graphs needs images of one size, and --tta' in capsys.readouterr().err
