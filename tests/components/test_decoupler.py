import pytest
import torch

from anomalib_decad.components import Decoupler, DecouplerOptions, InvertibleNetwork, InvertibleOptions, Prototypes


def make_decoupler(x=None, **options):
    """Make a decoupler, and prepare it by embeddings of images, (B, N, 16)."""
    options = {"abnormal_fraction": 0.5, "num_prototypes": 0, **options}
    decoupler = Decoupler(16, DecouplerOptions(**options), InvertibleOptions(hidden_dim=8))
    if x is not None:
        decoupler.train().initialize(x)
        if decoupler.prior is not None:
            abnormal, normal = (part.detach().flatten(0, 1) for part in decoupler.split(x))
            decoupler.prior.set([Prototypes(normal, abnormal, torch.zeros(len(normal)).long(), torch.zeros(1, 1))])
    return decoupler


@pytest.fixture(params=[0, 200], ids=["prior of 0", "prototypes"])
def decoupler(request):
    return make_decoupler(torch.randn(1, 200, 16), num_prototypes=request.param).eval()


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
        x_clean, energy = decoupler(torch.randn(2, 9, 16))[:2]
        again, left = decoupler(x_clean)[:2]
    assert energy.mean() > 0.01
    assert left.max() < 1e-6
    torch.testing.assert_close(again, x_clean, rtol=1e-3, atol=1e-4)


def test_energy_alone_is_the_same():
    decoupler, x = make_decoupler(torch.randn(1, 200, 16)).eval(), torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(decoupler.energy(x), decoupler(x).energy)


def test_weights_are_normalized_once_in_a_forward_pass(decoupler, monkeypatch):
    fold = InvertibleNetwork.fold
    folded = []

    def count(self, converged):
        folded.append(converged)
        return fold(self, converged)

    monkeypatch.setattr(InvertibleNetwork, "fold", count)
    decoupler.network._folded = None
    learned = decoupler.prior is None
    decoupler.train()(torch.randn(2, 9, 16))
    assert folded == [not learned]  # with prototypes it stays as it is
    with torch.no_grad():
        decoupler.eval()(torch.randn(2, 9, 16))
        decoupler(torch.randn(2, 9, 16))
    assert folded == ([False, True] if learned else [True])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01])
def test_both_components_need_channels(fraction):
    with pytest.raises(ValueError, match="abnormal_fraction"):
        make_decoupler(abnormal_fraction=fraction)


@pytest.mark.parametrize(("name", "value"), [("num_prototypes", -1), ("num_neighbors", 0)])
def test_the_prior_has_no_negative_size(name, value):
    with pytest.raises(ValueError, match=name):
        make_decoupler(**{name: value})


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_what_is_removed_is_not_seen_behind_it(fraction):
    """Whatever an anomaly does to the abnormal component, the cleaned embedding is the same."""
    x = torch.randn(1, 200, 16)
    decoupler = make_decoupler(x, abnormal_fraction=fraction, num_prototypes=200).eval()
    with torch.no_grad():
        latent = decoupler.network(x)
        latent[..., : decoupler.num_abnormal] += torch.randn(200, decoupler.num_abnormal)
        anomaly = decoupler.network.inverse(latent)
        torch.testing.assert_close(decoupler(anomaly).x_clean, decoupler(x).x_clean, rtol=1e-3, atol=1e-3)
        assert (anomaly - x).norm(dim=-1).min() > 0.1


def test_prior_restores_what_the_normal_component_tells():
    known = torch.randn(4, 1000, 8)
    x = torch.cat([known.abs(), known], dim=-1)
    restoration = {}
    for number in (0, 3000):
        decoupler = make_decoupler(x[:3], num_prototypes=number).eval()
        with torch.no_grad():
            clean, energy = decoupler(x[3:])
            # An anomaly that no longer fits what surrounds it in the embedding.
            abnormal = decoupler(torch.cat([x[3:, :, :8].roll(1, 1), known[3:]], dim=-1)).energy
        restoration[number] = (clean - x[3:]).square().mean()
        assert (abnormal.mean() > 3 * energy.mean()) == (number > 0)
    assert restoration[3000] < 0.3 * restoration[0]


@pytest.mark.parametrize("number", [0, 50])
def test_the_network_is_learned_only_with_a_prior_of_0(number):
    x = torch.randn(1, 50, 16)
    decoupler = make_decoupler(x, num_prototypes=number)
    assert all(parameter.requires_grad == (number == 0) for parameter in decoupler.parameters())
    assert decoupler(x).x_clean.requires_grad == (number == 0)
