"""What needs a GPU: the network and its operators, against float64 and stock operators.

pytest tests/test_gpu.py tests/ops        # on a machine with a CUDA device
"""

import copy
import itertools
import threading
import warnings
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from common.plain_conv2former import plain_conv2former
from helpers.comparisons import exact_float32, leaves, loss_of, randomized, relative_error
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerIsotropic, use_cuda_graphs
from mmconv2former.engine import cuda_graphs
from mmconv2former.ops import DepthwiseConv, depthwise, depthwise_conv2d, triton_support

pytestmark = pytest.mark.gpu
ARCH = dict(channels=(16, 24, 32, 40), depths=(1, 1, 2, 1), kernel_size=(11, 9, 7, 3))
IMPLEMENTATIONS = ['auto', 'native', 'cudnn']


@pytest.fixture(autouse=True)
def without_tf32():
    with exact_float32():
        yield


def build(seed=0, **options):
    torch.manual_seed(seed)
    return randomized(Conv2Former(ARCH, **options))


def gradients(outputs, model):
    """The gradient of every parameter, by name."""
    model.zero_grad()
    loss_of([output.double() for output in outputs]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def exact(model, x):
    """Outputs and gradients of the plain implementation in float64, on the GPU."""
    state = leaves(copy.deepcopy(model).double())
    outputs = plain_conv2former(x.double(), state, model.depths, model.training)
    loss_of(outputs).backward()
    return outputs, {name: state[name].grad for name, _ in model.named_parameters()}


@pytest.mark.parametrize('setting', IMPLEMENTATIONS)
@pytest.mark.parametrize('recompute', ['nothing', 'elementwise', 'expansion'])
@pytest.mark.parametrize('with_cp', [False, True])
def test_network_in_float32(setting, recompute, with_cp, monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', setting)
    model = build(recompute=recompute, with_cp=with_cp).cuda()
    x = torch.randn(2, 3, 96, 75, device='cuda')
    outputs, grads = exact(model, x)
    found = model(x)
    for value, reference in zip(found, outputs):
        assert relative_error(value.double(), reference) < 1e-4
    for name, value in gradients(found, model).items():
        assert relative_error(value.double(), grads[name]) < 1e-4, name


@pytest.mark.parametrize('setting', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_network_in_half_precision(setting, dtype, monkeypatch):
    """As close to float64 as stock operators under the same autocast, within a factor of two.

    Means over several networks: some gradients of one are sums of a dozen rounded values.
    """
    monkeypatch.setattr(depthwise, 'setting', setting)
    errors, of_stock = defaultdict(float), defaultdict(float)
    seeds = range(4)
    for seed in seeds:
        model = build(seed).cuda()
        x = torch.randn(2, 3, 96, 75, device='cuda')
        outputs, grads = exact(model, x)
        exact_values = dict(enumerate(outputs)) | grads
        state = leaves(model)
        with torch.autocast('cuda', dtype):
            stock = plain_conv2former(x, state, model.depths, model.training)
            found = model(x)
        loss_of([output.double() for output in stock]).backward()
        values = dict(enumerate(found)) | gradients(found, model)
        for name, reference in exact_values.items():
            plain = state[name].grad if name in grads else stock[name]
            errors[name] += relative_error(values[name].double(), reference) / len(seeds)
            of_stock[name] += relative_error(plain.double(), reference) / len(seeds)
    for name, error in errors.items():
        assert error < 2 * of_stock[name] + 2e-3, name


def test_deployed_form():
    model = build().cuda().eval()
    x = torch.randn(1, 3, 96, 75, device='cuda')
    with torch.no_grad():
        expected = model(x)
        for value, reference in zip(copy.deepcopy(model).switch_to_deploy()(x), expected):
            assert relative_error(value, reference) < 1e-4


def test_training_in_float16_with_a_loss_scaler():
    torch.manual_seed(0)
    model = Conv2Former(ARCH, layer_scale_init_value=0.1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    scaler = torch.amp.GradScaler('cuda')
    x, losses = torch.randn(2, 3, 64, 64, device='cuda'), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16):
            loss = sum((output.float() - 1).square().mean() for output in model(x))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_distributed_wrapper(tmp_path):
    """One process with NCCL: the same gradients, and no warning about their strides."""
    model = build().cuda()
    x = torch.randn(2, 3, 64, 64, device='cuda')
    expected = {name: grad.clone() for name, grad in gradients(model(x), model).items()}
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('nccl', store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(
            copy.deepcopy(model), device_ids=[0], gradient_as_bucket_view=True
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            found = gradients(wrapped(x), wrapped.module)
        assert not any('strides' in str(warning.message) for warning in caught)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], msg=name)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('training', [False, True])
def test_compiled(training):
    """One graph by inductor, with the depthwise convolutions as nodes, for several sizes."""
    model = build().cuda().train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size, dtype in itertools.product([(64, 96), (96, 64)], [None, torch.bfloat16]):
        tolerance = 1e-4 if dtype is None else 5e-2
        x = torch.randn(2, 3, *size, device='cuda')
        found = []
        for network in (compiled, model):
            with (
                torch.set_grad_enabled(training),
                torch.autocast('cuda', dtype or torch.bfloat16, enabled=dtype is not None),
            ):
                outputs = network(x)
            grads = gradients(outputs, model) if training else {}
            found.append([*outputs, *(grad.clone() for grad in grads.values())])
        for value, expected in zip(*found):
            assert relative_error(value.double(), expected.double()) < tolerance


def assert_near(value, reference, tolerance, name=''):
    """Like `relative_error`, also for zeros, such as gradients of a dropped block."""
    value, reference = value.double(), reference.double()
    assert (value - reference).norm() <= tolerance * reference.norm(), name


def autocast(dtype):
    return torch.autocast('cuda', dtype or torch.bfloat16, enabled=dtype is not None)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('form', ['for training', 'deployed', 'isotropic', 'half'])
def test_inference_by_cuda_graphs(form, dtype):
    """Replays with new inputs compute what the network does."""
    if form == 'half' and dtype is None:
        pytest.skip('is of half precision')
    torch.manual_seed(0)
    plain = Conv2FormerIsotropic(dict(channels=16, depth=2)) if form == 'isotropic' else build()
    plain = randomized(plain).cuda().eval()
    if form in ('deployed', 'half'):
        plain.switch_to_deploy()
    precision = autocast(None if form == 'half' else dtype)
    model = use_cuda_graphs(copy.deepcopy(plain))
    if form == 'half':
        model, plain = model.to(dtype), plain.to(dtype)
    inputs = torch.randn(4, 2, 3, 96, 75, device='cuda').to(next(plain.parameters()).dtype)
    tolerance = 1e-5 if dtype is None else 1e-2
    found = []
    for x, mode in zip(inputs, [torch.inference_mode, torch.no_grad] * 2):
        with mode(), precision:
            found.append(model(x))
    assert len(model.forward.graphs) == 1
    with torch.no_grad(), precision:
        for x, outputs in zip(inputs, found):
            for value, reference in zip(outputs, plain(x)):
                assert value.dtype == reference.dtype
                assert relative_error(value.double(), reference.double()) < tolerance


@torch.no_grad()
def test_cuda_graphs_refuse_sizes_and_follow_weights():
    model = use_cuda_graphs(build().cuda().eval())
    x = torch.randn(2, 3, 64, 96, device='cuda')
    model(x)
    with pytest.raises(ValueError, match=r'captured for \(2, 3, 64, 96\), got \(2, 3, 96, 64\)'):
        model(torch.randn(2, 3, 96, 64, device='cuda'))
    plain = copy.deepcopy(model)
    for change in (
        lambda network: None,
        lambda network: network.stages[1][0].mlp.fc1.weight.mul_(2),
        lambda network: network.stages[1][0].mlp.fc1.weight.data.mul_(2),  # the graph reads it
        lambda network: network.cpu().cuda(),
        lambda network: network.switch_to_deploy(),
        lambda network: network.cpu().cuda(),
    ):
        for network in (model, plain):
            change(network)
        for inputs in (x, torch.randn_like(x), x[:1]):
            for value, reference in zip(model(inputs), plain(inputs)):
                assert relative_error(value, reference) < 1e-5
    model.cpu()
    with pytest.raises(RuntimeError, match='on cpu'):
        model(x.cpu())


@torch.no_grad()
def test_cuda_graphs_beside_other_work():
    """A thread that pins memory during the capture, another stream, a capture around it."""
    plain = build().cuda().eval()
    model = use_cuda_graphs(copy.deepcopy(plain))
    x = torch.randn(2, 3, 64, 96, device='cuda')
    expected = plain(x)
    done = threading.Event()

    def pin():
        while not done.is_set():
            torch.ones(2**20).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        found = [model(x)]
    finally:
        done.set()
        thread.join()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.append(model(x))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.append(model(x))
    graph.replay()
    assert len(model.forward.graphs) == 1
    for outputs in found:
        for value, reference in zip(outputs, expected):
            assert relative_error(value, reference) < 1e-5


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('options', [{}, dict(recompute='nothing'), dict(frozen_stages=1)])
def test_training_by_cuda_graphs(options, dtype):
    """Losses, gradients, statistics and random numbers, with and without accumulation."""
    plain = build(drop_path_rate=0.5, **options).cuda().train()
    model = use_cuda_graphs(copy.deepcopy(plain), inference=False, training=True)
    optimizers = [torch.optim.SGD(network.parameters(), 1e-3) for network in (model, plain)]
    tolerance = 1e-4 if dtype is None else 3e-2
    for number in range(4):
        x = torch.randn(2, 3, 64, 96, device='cuda')
        found = []
        for network, optimizer in zip((model, plain), optimizers):
            torch.cuda.manual_seed(number)
            with autocast(dtype):
                outputs = network(x)
            loss = loss_of([output.double() for output in outputs])
            loss.backward()
            grads = {
                name: parameter.grad.clone()
                for name, parameter in network.named_parameters()
                if parameter.grad is not None
            }
            found.append((loss.detach(), grads, torch.cuda.get_rng_state()))
            if number != 1:  # accumulate: add the gradients to those of the next step
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        (loss, grads, random), (expected_loss, expected, expected_random) = found
        assert_near(loss, expected_loss, tolerance)
        assert grads.keys() == expected.keys()
        for name, value in grads.items():
            assert_near(value, expected[name], tolerance, name)
        assert torch.equal(random, expected_random)
        for (name, value), reference in zip(model.named_buffers(), plain.buffers()):
            assert_near(value, reference, tolerance, name)
    assert len(model.forward.graphs) == 1
    with autocast(dtype), pytest.raises(ValueError, match='CUDA graphs need inputs of one size'):
        model(torch.randn(2, 3, 96, 64, device='cuda'))
    with torch.no_grad():  # as in a validation
        model.eval()(torch.randn(1, 3, 96, 64, device='cuda'))


def test_more_than_2_to_the_31_elements():
    """The last image of a batch and the last rows of an image, against the same part alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip('needs 40 GiB of GPU memory')
    weight = torch.randn(64, 1, 3, 3, device='cuda', dtype=torch.bfloat16)
    for shape in [(9, 2048, 2048, 64), (1, 2**15, 1100, 64)]:
        x = torch.zeros(shape, device='cuda', dtype=torch.bfloat16)
        assert x.numel() > 2**31
        x[-1, -40:] = torch.randn_like(x[-1, -40:])
        last = x[-1:, -40:].clone()
        out = depthwise_conv2d(x, weight)
        assert torch.equal(out[-1, -39:], depthwise_conv2d(last, weight)[0, 1:])
        weight_grad = depthwise.depthwise_conv_backward(x, x, weight, (False, True, False))[1]
        reference = depthwise.depthwise_conv_backward(last, last, weight, (False, True, False))[1]
        assert relative_error(weight_grad, reference) < 1e-5
        del x, out


def test_a_second_device_or_stream():
    """Launches use the device of the tensor and the current stream."""
    conv = DepthwiseConv(64, 11).cuda()
    x = torch.randn(4, 50, 50, 64, device='cuda')
    expected = conv(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = conv(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)
    if torch.cuda.device_count() > 1:
        other = copy.deepcopy(conv).to('cuda:1')
        assert torch.equal(other(x.to('cuda:1')).cpu(), expected.cpu())


def test_a_new_size_compiles_nothing():
    weight = torch.randn(24, 1, 11, 11, device='cuda', requires_grad=True)
    if depthwise.device_choice(weight, torch.float32) != 'triton':
        pytest.skip('this GPU does not run Triton')
    kernels = triton_support.load('depthwise_triton')
    triton_support.load('launch').forget_launches()
    kernels.forward_launcher.cache_clear()
    kernels.shares_launcher.cache_clear()
    for size in [(5, 7), (16, 16), (33, 1), (1, 64)]:
        x = torch.randn(1, *size, 24, device='cuda', requires_grad=True)
        depthwise_conv2d(x, weight).sum().backward()
        reference = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=5, groups=24)
        torch.testing.assert_close(depthwise_conv2d(x, weight).permute(0, 3, 1, 2), reference,
                                   atol=1e-4, rtol=1e-4)  # fmt: skip
    assert kernels.forward_launcher.cache_info().misses == 2  # forward and input gradient
    assert kernels.shares_launcher.cache_info().misses == 1


@torch.no_grad()
def test_cuda_graph_reads_no_memory_that_was_freed():
    """Casts that a network keeps are not freed when it is called in another precision."""
    for network in (build(), build().switch_to_deploy()):
        model = use_cuda_graphs(network.cuda().eval())
        x = torch.randn(2, 3, 64, 96, device='cuda')
        with autocast(torch.bfloat16):
            expected = model(x)
        model.forward.plain(x)  # in float32, without a graph
        torch.cuda.synchronize()
        other = []  # overwrites whatever was freed, on both streams
        for stream in (torch.cuda.current_stream(), cuda_graphs.side_stream(x.device)):
            with torch.cuda.stream(stream):
                other += [torch.full((2**k,), -1, device='cuda') for k in range(4, 20)]
                other += [torch.full((2**10,), -1, device='cuda') for _ in range(500)]
        torch.cuda.synchronize()
        with autocast(torch.bfloat16):
            for value, reference in zip(model(x), expected):
                assert relative_error(value.double(), reference.double()) < 1e-2
        del other
