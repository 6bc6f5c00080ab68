"""What other patches of an image say about a patch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components.image_prior import ImagePrior, latent_energy

GRID = (9, 12)
COUNT = GRID[0] * GRID[1]


def stripes(noise=0.05, images=3):
    """Give components of images whose patches repeat along the columns, and no expectation."""
    period = torch.arange(COUNT) % GRID[1] % 3
    normal = torch.eye(3)[period] * 4 + noise * torch.randn(images, COUNT, 3)
    values = torch.randn(3, 6)
    abnormal = values[period] + noise * torch.randn(images, COUNT, 6)
    return abnormal, normal, torch.zeros_like(abnormal)


ALL = torch.arange(COUNT).expand(3, -1)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    abnormal, normal, _ = components = stripes()
    prior = ImagePrior(6)
    expected = torch.randn_like(abnormal)
    torch.testing.assert_close(prior(abnormal, normal, expected, GRID), expected)
    prior.fit(*components, grid=GRID, chosen=ALL)
    return prior, *components


def test_what_repeats_explains_itself_in_each_image_alone(parts):
    prior, *components = parts
    together = prior(*components, GRID)
    assert (components[0] - together).square().mean() < 0.05 * components[0].square().mean()
    alone = [prior(*(part[None] for part in image), GRID)[0] for image in zip(*components, strict=True)]
    torch.testing.assert_close(torch.stack(alone), together)


def test_gains_are_least_squares(parts):
    prior, abnormal, normal, _ = parts
    torch.manual_seed(1)
    expected = 0.5 * abnormal + 0.3 * torch.randn_like(abnormal)
    prior.fit(abnormal, normal, expected, GRID, ALL)
    seen = prior._look(abnormal, normal, expected, GRID)
    by_channel = torch.stack([expected, seen], dim=-1).flatten(0, 1).transpose(0, 1)
    gains = torch.linalg.lstsq(by_channel, abnormal.flatten(0, 1).T[..., None]).solution[..., 0]
    torch.testing.assert_close(torch.stack([prior.prototype_gain, prior.image_gain], 1), gains, atol=0.02, rtol=0)


def test_an_abnormal_patch_says_next_to_nothing_about_others(parts):
    prior, abnormal, normal, expected = parts
    before = prior(abnormal, normal, expected, GRID)
    changed = abnormal.clone()
    changed[:, 50] += 10
    after = prior(changed, normal, expected, GRID)
    # With the weight of a normal patch it would be 10 / 36 of the gain.
    assert (after - before).abs().max() < 0.02
    # What is normal does.
    assert prior(abnormal * 0.9, normal, expected, GRID).sub(before).abs().max() > 1e-2


def test_a_patch_does_not_look_at_itself_or_near_it(parts):
    prior, abnormal, normal, expected = parts
    with torch.no_grad():
        prior.log_beta.fill_(5.0)  # Only what is equal counts.
    normal = torch.randn_like(normal)
    normal[:, 40] = normal[:, 41]
    before = prior(abnormal, normal, expected, GRID)
    changed = abnormal.clone()
    changed[:, 41] += 0.1
    torch.testing.assert_close(prior(changed, normal, expected, GRID)[:, 40], before[:, 40], atol=1e-3, rtol=0)
    far = COUNT - 1
    normal[:, far] = normal[:, 40]
    before = prior(abnormal, normal, expected, GRID)
    changed[:, far] += 0.1
    assert (prior(changed, normal, expected, GRID)[:, 40] - before[:, 40]).abs().max() > 1e-2


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (4, 4), (5, 5), (1, 30), (20, 20), (37, 10)])
def test_no_patch_of_an_image_of_any_size_looks_at_itself(grid):
    count = grid[0] * grid[1]
    prior = ImagePrior(1)
    with torch.no_grad():
        prior.image_gain.fill_(1.0)
        prior.prototype_gain.fill_(0.0)
    abnormal = torch.zeros(count, count, 1)
    abnormal[torch.arange(count), torch.arange(count)] = 1
    seen = prior(abnormal, torch.zeros(count, count, 2), abnormal, grid)[..., 0]
    assert seen.diagonal().abs().max() < 1e-6
    assert seen.sum() > 0


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 5), (1, 30)])
def test_small_images_are_finite(grid):
    count = grid[0] * grid[1]
    prior = ImagePrior(6)
    abnormal, normal, expected = 100 * torch.randn(2, count, 6), torch.randn(2, count, 3), torch.randn(2, count, 6)
    prior.fit(abnormal, normal, expected, grid, torch.zeros(2, 1, dtype=torch.long))
    assert torch.isfinite(prior(1e6 * abnormal, normal, expected, grid)).all()


def test_gains_beta_and_prototypes_learn_and_components_get_no_gradient(parts):
    prior, abnormal, normal, expected = parts
    expected = torch.randn_like(expected)
    abnormal, normal, expected = (part.requires_grad_() for part in (abnormal, normal, expected))
    prior(abnormal, normal, expected, GRID).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prior.parameters())
    assert abnormal.grad is None
    assert normal.grad is None
    assert expected.grad is not None


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
