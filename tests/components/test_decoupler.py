import pytest
import torch
from torch.nn.utils import parametrize

from anomalib_decad.components import Decoupler, DecouplerOptions, InvertibleOptions


def make_decoupler(**options):
    return Decoupler(16, DecouplerOptions(**options), InvertibleOptions(hidden_dim=8))


@pytest.fixture(params=[0, 32], ids=["prior of 0", "conditional prior"])
def decoupler(request):
    decoupler = make_decoupler(prior_dim=request.param).train()
    x = torch.randn(200, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x)
    return decoupler.eval()


def test_shapes_and_sign(decoupler):
    x_clean, energy = decoupler(torch.randn(2, 9, 16))
    assert x_clean.shape == (2, 9, 16)
    assert energy.shape == (2, 9)
    assert (energy >= 0).all()


def test_removal_acts_patch_by_patch(decoupler):
    x = torch.randn(2, 9, 16)
    changed = x.clone()
    changed[1, 4] += 3
    with torch.no_grad():
        different = (decoupler(x)[0] != decoupler(changed)[0]).any(-1)
    assert different.nonzero().tolist() == [[1, 4]]


def test_removal_leaves_no_energy_and_is_idempotent(decoupler):
    with torch.no_grad():
        x_clean, energy = decoupler(torch.randn(2, 9, 16))
        again, left = decoupler(x_clean)
    assert energy.mean() > 0.1
    assert left.max() < 1e-6
    torch.testing.assert_close(again, x_clean, rtol=1e-3, atol=1e-4)


def test_energy_alone_is_the_same(decoupler):
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(decoupler.energy(x), decoupler(x)[1])


def test_weights_are_normalized_once_in_a_forward_pass(decoupler, monkeypatch):
    computed = []
    forward = parametrize.ParametrizationList.forward

    def count(self):
        computed.append(self)
        return forward(self)

    monkeypatch.setattr(parametrize.ParametrizationList, "forward", count)
    with torch.no_grad():
        decoupler(torch.randn(2, 9, 16))
    assert len(computed) == len(set(computed)) > 0


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01])
def test_both_components_need_channels(fraction):
    with pytest.raises(ValueError, match="abnormal_fraction"):
        make_decoupler(abnormal_fraction=fraction)


def test_prior_is_not_negative():
    with pytest.raises(ValueError, match="prior_dim"):
        make_decoupler(prior_dim=-1)


def test_prior_restores_what_the_normal_component_tells():
    torch.manual_seed(0)
    known = torch.randn(4000, 8)
    x = torch.cat([known.abs(), known], dim=-1)
    clean = {}
    for prior_dim in (0, 128):
        decoupler = make_decoupler(prior_dim=prior_dim).train()
        decoupler.initialize(x)
        decoupler.fit_prior(x)
        with torch.no_grad():
            clean[prior_dim], energy = decoupler.eval()(x)
            # An anomaly that no longer fits what surrounds it in the embedding.
            abnormal = decoupler.energy(torch.cat([x[:, :8].roll(1, 0), known], dim=-1))
        assert (abnormal.mean() > 3 * energy.mean()) == (prior_dim > 0)
    restoration = {dim: (x_clean - x).square().mean() for dim, x_clean in clean.items()}
    assert restoration[128] < 0.3 * restoration[0]


def test_losses_train_the_prior():
    decoupler = make_decoupler(prior_dim=8).train()
    x = torch.randn(50, 16)
    decoupler.initialize(x)
    x_clean, energy = decoupler(x[None])
    (x_clean.square().mean() + energy.mean()).backward()
    assert decoupler.prior.output.weight.grad.abs().max() > 0
