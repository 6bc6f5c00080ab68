import pytest
import torch
from torch.nn.utils import parametrize

from anomalib_decad.components import Decoupler


@pytest.fixture
def decoupler():
    decoupler = Decoupler(16, hidden_dim=8).train()
    decoupler.network.initialise(torch.randn(200, 16))
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


def test_weights_are_normalised_once_in_a_forward_pass(decoupler, monkeypatch):
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
        Decoupler(16, abnormal_fraction=fraction)
