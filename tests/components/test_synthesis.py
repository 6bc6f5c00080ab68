import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components import (
    AdversarialSynthesis,
    Decoupler,
    DecouplerOptions,
    InvertibleOptions,
    SynthesisOptions,
)


def quadratic(x):
    return x.square().mean(-1)


noises = pytest.mark.parametrize("noise", ["features", "gaussian"])


@settings(max_examples=30, deadline=None)
@given(
    delta=st.floats(0.01, 100),
    steps=st.integers(0, 3),
    noise=st.sampled_from(["features", "gaussian"]),
    energy=st.sampled_from([quadratic, lambda x: (x * 0).sum(-1)]),
    spread=st.sampled_from([0.0, 1.0]),
    batch=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dim=st.integers(2, 16),
)
def test_norm_is_delta_on_the_chosen_patches_and_zero_elsewhere(delta, steps, noise, energy, spread, batch, grid, dim):
    """Also where the energy has no gradient, or all patches are equal."""
    x = 1 + spread * torch.randn(batch, grid[0] * grid[1], dim, dtype=torch.float64)
    synthesis = AdversarialSynthesis(delta, SynthesisOptions(fraction=1.0, num_steps=steps, noise=noise))
    perturbed, mask = synthesis(x, energy, grid)
    assert mask.any()
    norms = (perturbed - x).norm(dim=-1)
    torch.testing.assert_close(norms[mask], torch.full_like(norms[mask], delta), rtol=1e-6, atol=1e-9)
    assert torch.equal(perturbed[~mask], x[~mask])


@noises
@pytest.mark.parametrize("stiffness", [1.0, 1e4])
def test_no_step_raises_the_energy_of_any_patch(noise, stiffness):
    """Neither where the energy rises as in a valley with steep walls, as it does where features hardly vary."""
    weights = torch.tensor([stiffness, 1.0, 1.0, 1.0])
    x = torch.randn(8, 64, 4) / weights.sqrt()

    def perturbed_energy(steps):
        torch.manual_seed(1)
        synthesis = AdversarialSynthesis(options=SynthesisOptions(fraction=1.0, num_steps=steps, noise=noise))
        perturbed, mask = synthesis(x, lambda y: (weights * y.square()).mean(-1))
        return (weights * perturbed.square()).mean(-1)[mask]

    random_, hard, harder = (perturbed_energy(steps) for steps in (0, 1, 5))
    assert (hard <= random_ * (1 + 1e-4)).all()
    assert (harder <= hard * (1 + 1e-4)).all()
    assert hard.mean() < 0.9 * random_.mean()


@noises
def test_no_step_ends_below_the_energy_of_the_patch_itself(noise):
    x = torch.randn(8, 64, 4)

    def perturbed_energy(steps):
        torch.manual_seed(1)
        synthesis = AdversarialSynthesis(1.0, SynthesisOptions(fraction=1.0, num_steps=steps, noise=noise))
        perturbed, mask = synthesis(x, quadratic)
        return quadratic(perturbed[mask]), quadratic(x[mask])

    start, own = perturbed_energy(0)
    hard, _ = perturbed_energy(3)
    assert (hard >= torch.minimum(start, own) * (1 - 1e-5)).all()
    # Near it where it started above, as far as a few lengths come.
    above = start > own
    assert (hard - own)[above].mean() < 0.5 * (start - own)[above].mean()


@pytest.mark.parametrize("steps", [0, 2])
def test_anomalies_vary_as_features_do(steps):
    """Embeddings within a plane are not moved out of it, whatever the energy."""
    plane = torch.linalg.qr(torch.randn(6, 2)).Q
    x = torch.randn(4, 25, 2) @ plane.T
    synthesis = AdversarialSynthesis(options=SynthesisOptions(fraction=1.0, num_steps=steps))
    perturbed, mask = synthesis(x, lambda y: (y - 1).square().mean(-1))
    off_plane = perturbed - perturbed @ plane @ plane.T
    assert mask.any()
    assert off_plane.abs().max() < 1e-5


def test_no_gradient_reaches_the_embeddings_or_the_parameters():
    decoupler = Decoupler(16, DecouplerOptions(0.5, num_prototypes=0), InvertibleOptions(hidden_dim=8))
    x = torch.randn(2, 64, 16, requires_grad=True)
    perturbed, _ = AdversarialSynthesis(options=SynthesisOptions(fraction=1.0))(x, decoupler.energy)
    assert not perturbed.requires_grad
    assert x.grad is None
    assert all(parameter.grad is None for parameter in decoupler.parameters())


@given(
    fraction=st.floats(0, 1), batch=st.integers(1, 12), grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_how_many_patches_are_perturbed_follows_from_the_shape_alone(fraction, batch, grid, seed):
    torch.manual_seed(seed)
    synthesis = AdversarialSynthesis(options=SynthesisOptions(fraction=fraction, num_steps=0))
    _, mask = synthesis(torch.zeros(batch, grid[0] * grid[1], 2), quadratic, grid)
    images = max(round(fraction * batch), 1) if fraction else 0
    assert mask.any(1).sum() <= images
    assert mask.sum() == (max(round(0.16 * images * mask.shape[1]), 1) if images else 0)


def test_regions_differ_in_size():
    _, mask = AdversarialSynthesis(options=SynthesisOptions(0.5, num_steps=0))(torch.zeros(200, 400, 2), quadratic)
    shares = mask.float().mean(1)
    assert (shares > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0.01 < shares[shares > 0].min() < 0.05
    assert 0.25 < shares.max() < 0.35


def test_perturbed_patches_lie_together_in_blobs():
    """The wider the blobs, the more of a perturbed patch's neighbors are perturbed; 1 leaves that to chance."""

    def neighbors(blob_size):
        torch.manual_seed(0)
        synthesis = AdversarialSynthesis(options=SynthesisOptions(fraction=1.0, num_steps=0, blob_size=blob_size))
        _, mask = synthesis(torch.zeros(200, 400, 2), quadratic)
        grid = mask.view(-1, 20, 20)
        pairs = grid[:, 1:] & grid[:, :-1]
        return (pairs.sum((1, 2)) / mask.sum(1)).mean().item(), mask.float().mean().item()

    scattered, share = neighbors(1)
    assert scattered == pytest.approx(share, abs=0.05)
    blobs, wide = neighbors(4)[0], neighbors(10)[0]
    assert scattered + 0.3 < blobs < wide
