import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.components.invertible.chain import scaled_pila, scaled_pila_with_slope


def pila(x, k=5.0):
    return scaled_pila(k * x) / (2 * k)


@given(x=st.floats(-20, 20), k=st.floats(0.5, 20))
def test_value_is_the_formula(x, k):
    expected = x if x >= 0 else (k**2 * x**3 / 2 - k * x**2 + x) * np.exp(k * x)
    assert pila(torch.tensor(x, dtype=torch.float64), k).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(x=st.floats(-20, 20), k=st.floats(0.5, 20))
def test_slope_is_the_formula_and_at_most_one(x, k):
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(pila(point, k), point)
    t = min(k * x, 0)
    assert slope.item() == pytest.approx((t**3 / 2 + t**2 / 2 - t + 1) * np.exp(t), rel=1e-9, abs=1e-12)
    assert -0.36 < slope.item() <= 1 + 1e-12


def test_large_inputs_stay_finite():
    x = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30], requires_grad=True)
    y = pila(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


@given(x=st.floats(-100, 100))
def test_slope_of_scaled_is_its_derivative(x):
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value, slope = scaled_pila_with_slope(point.detach())
    expected = scaled_pila(point)
    (expected_slope,) = torch.autograd.grad(expected, point)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-9, atol=1e-12)
