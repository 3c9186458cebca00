"""`torch.compile`: one graph, forward and backward, for all sizes."""

import pytest
import torch
from helpers.comparisons import SMALL_ARCHS, loss_of, randomized, relative_error

from mmconv2former import Conv2Former, Conv2FormerIsotropic


class CountingBackend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name, **options):
    if name == 'isotropic':
        arch = dict(channels=8, depth=2, kernel_size=5)
        return randomized(Conv2FormerIsotropic(arch, patch_embedding='conv', **options))
    return randomized(Conv2Former(SMALL_ARCHS[name], **options))


@pytest.mark.parametrize('name', ['narrow', 'isotropic'])
@pytest.mark.parametrize('training', [False, True])
def test_one_graph_for_all_sizes(name, training):
    """Torch makes further ones for squares and for one image, and none for a new size."""
    backend = CountingBackend()
    model = build(name).train(training)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for shape in [(2, 3, 64, 96), (2, 3, 96, 160), (3, 3, 128, 64), (2, 3, 160, 224)]:
        compiled(torch.randn(shape))
    assert backend.count == 1
    for shape in [(2, 3, 64, 64), (2, 3, 96, 96), (1, 3, 64, 96), (1, 3, 96, 128)]:
        compiled(torch.randn(shape))
    assert backend.count <= 3


@pytest.mark.parametrize('recompute', ['nothing', 'elementwise'])
@pytest.mark.parametrize('fusion', ['hadamard', 'linear'])
def test_forward_and_backward(recompute, fusion):
    model = build('narrow', recompute=recompute, fusion=fusion).double()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    expected = model(x)
    loss_of(expected).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    outputs = compiled(x)
    loss_of(outputs).backward()
    for output, reference in zip(outputs, expected):
        assert relative_error(output, reference) < 1e-12
    for parameter, reference in zip(model.parameters(), gradients):
        assert relative_error(parameter.grad, reference) < 1e-10


def test_deployed_form():
    model = build('narrow').switch_to_deploy()
    x = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        for output, reference in zip(compiled(x), model(x)):
            assert relative_error(output, reference) < 1e-5
