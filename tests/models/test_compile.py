"""`torch.compile`: one graph, forward and backward, for all sizes."""

import pytest
import torch
from helpers.comparisons import SMALL_ISOTROPIC_ARCH, loss_of, randomized, relative_error

from mmconv2former import Conv2Former, Conv2FormerIsotropic

ARCH = dict(channels=(8, 12), depths=(1, 1), kernel_size=5)  # two stages have every kind of layer
NETWORKS = {
    'hierarchical': lambda **options: Conv2Former(ARCH, out_indices=(0, 1), **options),
    'isotropic': lambda **options: Conv2FormerIsotropic(
        SMALL_ISOTROPIC_ARCH, patch_embedding='conv', out_indices=(0, 1), **options
    ),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('training', [False, True])
def test_one_graph_for_all_sizes(name, training):
    """Torch makes further ones for squares and for one image, and none for a new size."""
    graphs = []
    compiled = torch.compile(
        NETWORKS[name]().train(training),
        backend=lambda graph, _: graphs.append(graph) or graph,
        fullgraph=True,
        dynamic=True,
    )
    for shape in [(2, 3, 64, 96), (2, 3, 96, 160), (3, 3, 128, 64), (2, 3, 160, 224)]:
        compiled(torch.randn(shape))
    assert len(graphs) == 1
    for shape in [(2, 3, 64, 64), (2, 3, 96, 96), (1, 3, 64, 96), (1, 3, 96, 128)]:
        compiled(torch.randn(shape))
    assert len(graphs) <= 3


@pytest.mark.parametrize('recompute', ['nothing', 'elementwise'])
@pytest.mark.parametrize('fusion', ['hadamard', 'linear'])
def test_forward_and_backward(recompute, fusion):
    model = NETWORKS['hierarchical'](recompute=recompute, fusion=fusion)
    model = randomized(model.double())
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
    model = randomized(NETWORKS['hierarchical']()).switch_to_deploy()
    x = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        for output, reference in zip(compiled(x), model(x)):
            assert relative_error(output, reference) < 1e-5
