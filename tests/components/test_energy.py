"""How far an abnormal component is from what is expected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components.energy import latent_energy


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_residuals_over_their_own_variance_have_an_energy_of_1_however_scaled(seed, scale):
    torch.manual_seed(seed)
    residual = scale * torch.randn(200, 6, dtype=torch.float64) * torch.rand(6, dtype=torch.float64).add(0.1)
    energy = latent_energy(residual, residual.square().mean(0))
    assert energy.shape == (200,)
    assert energy.min() >= 0
    assert energy.mean().item() == pytest.approx(1.0)


def test_rounding_of_a_constant_channel_is_not_the_energy():
    residual = torch.randn(200, 6)
    residual[:, 0] = 1e-7
    assert latent_energy(residual, torch.tensor([1e-20, 1, 1, 1, 1, 1])).max() < 20


def test_shape_of_images():
    assert latent_energy(torch.randn(2, 5, 6), torch.ones(6)).shape == (2, 5)
