"""The paper's ways to join A and V: by formula, in the network, and where A is degenerate."""

import pytest
import torch
from helpers.comparisons import SMALL_ARCHS, compare_with_plain, randomized

from mmconv2former import Conv2Former
from mmconv2former.models.fusion import EPS, FUSIONS

# For A = (1, -3, 4) and V = (2, 2, 10), worked out by hand without the constants that avoid
# division by zero.
BY_HAND = {
    'hadamard': (2, -6, 40),
    'sum': (3, -1, 14),
    'sigmoid': (1.4621172, 0.0948518, 9.8201379),
    'l1': (2 / 8, -6 / 8, 40 / 8),
    'linear': (2 * 4 / 7, 0, 10),
}


@pytest.mark.parametrize('name', FUSIONS)
def test_values_and_gradients(name):
    a, v = torch.tensor([[1.0, -3, 4]]), torch.tensor([[2.0, 2, 10]])
    expected = torch.tensor([BY_HAND[name]], dtype=torch.float32)
    torch.testing.assert_close(FUSIONS[name](a, v), expected, rtol=1e-5, atol=1e-6)
    a, v = (torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(FUSIONS[name], (a, v))


@pytest.mark.parametrize('name', FUSIONS)
@pytest.mark.parametrize(
    ('training', 'recompute'), [(False, 'elementwise'), (True, 'nothing'), (True, 'expansion')]
)
def test_network_equals_plain_implementation(name, training, recompute):
    model = Conv2Former(SMALL_ARCHS['narrow'], fusion=name, recompute=recompute)
    model = randomized(model.double()).train(training)
    compare_with_plain(model, torch.randn(2, 3, 47, 35).double(), 1e-12, 1e-11, fusion=name)


@pytest.mark.parametrize('value', [0.0, 0.7, -2.0])
@pytest.mark.parametrize('name', FUSIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_constant_a(name, value, dtype):
    """One value everywhere: results as defined, gradients finite."""
    a = torch.full((2, 4), value, dtype=dtype, requires_grad=True)
    v = torch.arange(8.0).view(2, 4).to(dtype).requires_grad_()
    out = FUSIONS[name](a, v)
    a_, v_ = a.detach().double(), v.detach().double()
    expected = {
        'hadamard': a_ * v_,
        'sum': a_ + v_,
        'sigmoid': torch.sigmoid(a_) * v_,
        'l1': a_.sign() / 4 * v_,  # zero stays zero
        'linear': v_,  # the upper end of (0, 1]
    }[name]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    out.float().sum().backward()
    for gradient in (a.grad, v.grad):
        assert not gradient.isnan().any()
        if dtype == torch.float32:
            assert gradient.isfinite().all()
            assert gradient.abs().max() <= 8 / EPS


def test_linear_is_in_the_half_open_interval():
    a = torch.randn(1000, 8)
    weights = FUSIONS['linear'](a, torch.ones_like(a))
    assert weights.min() > 0
    assert (weights.max(-1).values == 1).all()
