import pytest
import torch

from anomalib_decad.components import Decoupler, DecouplerOptions, InvertibleNetwork, InvertibleOptions
from anomalib_decad.components import precision as parts_module


def make_decoupler(**options):
    options = {"abnormal_fraction": 0.5, "prior_dim": 0, "num_prototypes": 0, **options}
    return Decoupler(16, DecouplerOptions(**options), InvertibleOptions(hidden_dim=8))


@pytest.fixture(params=[(0, 0), (16, 0), (16, 8)], ids=["prior of 0", "prototypes", "prototypes and network"])
def decoupler(request):
    decoupler = make_decoupler(num_prototypes=request.param[0], prior_dim=request.param[1]).train()
    x = torch.randn(200, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x)
    return decoupler.eval()


def test_shapes_and_sign(decoupler):
    x_clean, energy, abnormal, normal = decoupler(torch.randn(2, 9, 16))[:4]
    assert x_clean.shape == (2, 9, 16)
    assert energy.shape == (2, 9)
    assert (energy >= 0).all()
    assert abnormal.shape == normal.shape == (2, 9, 8)


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
    assert energy.mean() > 0.1
    assert left.max() < 1e-6
    torch.testing.assert_close(again, x_clean, rtol=1e-3, atol=1e-4)


def test_energy_alone_is_the_same(decoupler):
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(decoupler.energy(x), decoupler(x)[1])


def test_weights_are_normalized_once_in_a_forward_pass(decoupler, monkeypatch):
    fold = InvertibleNetwork.fold
    folded = []

    def count(self, converged):
        folded.append(converged)
        return fold(self, converged)

    monkeypatch.setattr(InvertibleNetwork, "fold", count)
    decoupler.train()(torch.randn(2, 9, 16))
    assert folded == [False]
    with torch.no_grad():
        decoupler.eval()(torch.randn(2, 9, 16))
        decoupler(torch.randn(2, 9, 16))
    assert folded == [False, True]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01])
def test_both_components_need_channels(fraction):
    with pytest.raises(ValueError, match="abnormal_fraction"):
        make_decoupler(abnormal_fraction=fraction)


@pytest.mark.parametrize("name", ["num_prototypes", "prior_dim"])
def test_the_prior_has_no_negative_size(name):
    with pytest.raises(ValueError, match=name):
        make_decoupler(**{name: -1})


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_what_is_removed_is_not_seen_behind_it(fraction):
    """Whatever an anomaly does to the abnormal component, the cleaned embedding is the same."""
    decoupler = make_decoupler(abnormal_fraction=fraction, num_prototypes=16, prior_dim=8).train()
    x = torch.randn(200, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x)
    decoupler.eval()
    with torch.no_grad():
        latent = decoupler.network(x)
        latent[:, : decoupler.num_abnormal] += torch.randn(200, decoupler.num_abnormal)
        anomaly = decoupler.network.inverse(latent)
        torch.testing.assert_close(decoupler(anomaly).x_clean, decoupler(x).x_clean, rtol=1e-3, atol=1e-3)
        assert (anomaly - x).norm(dim=-1).min() > 0.1


def test_prior_restores_what_the_normal_component_tells():
    torch.manual_seed(0)
    known = torch.randn(4000, 8)
    x = torch.cat([known.abs(), known], dim=-1)
    clean = {}
    for num_prototypes in (0, 64):
        decoupler = make_decoupler(num_prototypes=num_prototypes, prior_dim=128).train()
        decoupler.initialize(x)
        if decoupler.prior:
            decoupler.prior.fit(*reversed(decoupler._split(x, None)), num_epochs=128)
        with torch.no_grad():
            clean[num_prototypes], energy = decoupler.eval()(x)[:2]
            # An anomaly that no longer fits what surrounds it in the embedding.
            abnormal = decoupler.energy(torch.cat([x[:, :8].roll(1, 0), known], dim=-1))
        assert (abnormal.mean() > 3 * energy.mean()) == (num_prototypes > 0)
    restoration = {number: (x_clean - x).square().mean() for number, x_clean in clean.items()}
    assert restoration[64] < 0.3 * restoration[0]


def test_the_priors_own_loss_trains_the_prior_alone():
    decoupler = make_decoupler(num_prototypes=8, prior_dim=8).train()
    x = torch.randn(50, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x)
    output = decoupler(x[None])
    perturbed = torch.arange(50)[None] < 20
    with torch.no_grad():
        output.abnormal[perturbed] = torch.inf  # must not be seen
    error = decoupler.update_statistics(output, perturbed)
    assert error.shape == (25,)
    assert torch.isfinite(error).all()
    error.mean().backward()
    assert all(parameter.grad is not None for parameter in decoupler.prior.parameters())
    assert all(parameter.grad is None for parameter in decoupler.network.parameters())


def test_a_normal_patch_has_an_energy_of_about_one_however_channels_are_scaled():
    decoupler = make_decoupler(num_prototypes=8, prior_dim=8).train()
    x = torch.randn(500, 16)
    decoupler.initialize(x)
    torch.testing.assert_close(decoupler.fit_prior(x), decoupler.clean(x), rtol=0, atol=1e-2)
    assert decoupler.energy(x).mean().item() == pytest.approx(1, rel=0.05)
    energy = decoupler.energy(x)
    with torch.no_grad():
        network = decoupler.network
        # The network stretches a channel of the abnormal component, and the prior follows: nothing has changed.
        network.norm_scale[-1, 0] += 3
        network.norm_bias[-1, 0] *= torch.tensor(3.0).exp()
        decoupler.prior.values[0] *= torch.tensor(3.0).exp()
        decoupler.prior.residual.output.weight[0] *= torch.tensor(3.0).exp()
        decoupler.prior.residual.output.bias[0] *= torch.tensor(3.0).exp()
        torch.testing.assert_close(decoupler.energy(x), energy, rtol=1e-3, atol=1e-3)
        output = decoupler(x[None])
        output = output._replace(removed=3 * output.removed)  # the prior tells less
        for _ in range(1000):
            decoupler.update_statistics(output, torch.zeros(1, 500, dtype=torch.bool))
    assert decoupler.energy(x).mean().item() == pytest.approx(1 / 9, rel=0.05)


def test_reconstruction_trains_network_and_prior():
    decoupler = make_decoupler(num_prototypes=8, prior_dim=8).train()
    x = torch.randn(50, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x)
    decoupler(x[None], (5, 10)).x_clean.square().mean().backward()
    assert all(parameter.grad is not None for parameter in decoupler.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("prototypes", [0, 16])
def test_scales_of_the_latent_stay_where_a_prior_follows_it(prototypes):
    torch.manual_seed(0)
    decoupler = make_decoupler(num_prototypes=prototypes).train()
    x = torch.randn(200, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x)
    # What has next to no gradient is moved by the learning rate in each step all the same.
    parameters = [parameter for parameter in decoupler.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        (decoupler(x[None]).x_clean - x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        deviations = decoupler.network(x).std(0)
    stayed = bool(((deviations > 0.3) & (deviations < 3)).all())
    assert stayed == (prototypes > 0)


def test_images_are_fitted_to_and_their_variance_is_followed():
    torch.manual_seed(0)
    decoupler = make_decoupler(num_prototypes=8, prior_dim=8).train()
    grid, chosen = (9, 12), torch.arange(108).expand(4, -1)
    # Patches repeat along the rows.
    x = torch.randn(12, 16).repeat(4, 9, 1) + 0.1 * torch.randn(4, 108, 16)
    decoupler.initialize(x)
    decoupler.fit_prior(x.flatten(0, 1))
    alone = decoupler(x, grid)
    clean = decoupler.fit_image_prior(x, grid, chosen)
    torch.testing.assert_close(clean, decoupler.clean(x, grid).flatten(0, 1), rtol=0, atol=1e-2)
    output = decoupler(x, grid)
    torch.testing.assert_close(output.removed, x - output.x_clean)
    assert output.removed.square().mean() < 0.95 * alone.removed.square().mean()
    torch.testing.assert_close(decoupler.removed_variance, output.removed.square().mean().detach(), rtol=1e-2, atol=0)
    assert output.energy.mean().item() == pytest.approx(1, abs=0.01)
    decoupler.eval()
    torch.testing.assert_close(decoupler.clean(x, grid), decoupler(x, grid).x_clean.detach())
    assert not torch.allclose(decoupler.clean(x.flatten(0, 1)), decoupler.clean(x, grid).flatten(0, 1))
    decoupler.train()
    before = decoupler.removed_variance.clone()
    more = output._replace(removed=output.removed + 9)
    decoupler.update_statistics(more, torch.zeros(4, 108, dtype=torch.bool))
    assert decoupler.removed_variance > before


@pytest.mark.parametrize("options", [{"num_prototypes": 0}, {"num_prototypes": 8, "image_prior": False}])
def test_there_is_no_image_prior_to_fit(options):
    decoupler = make_decoupler(**options).train()
    x = torch.randn(2, 12, 16)
    decoupler.initialize(x)
    with pytest.raises(RuntimeError, match="num_prototypes above 0 and image_prior=True"):
        decoupler.fit_image_prior(x, (3, 4), torch.arange(12).expand(2, -1))


def test_many_embeddings_are_cleaned_in_parts(monkeypatch):
    monkeypatch.setattr(parts_module, "_ROWS", 7)
    decoupler = Decoupler(16, DecouplerOptions(num_prototypes=8, prior_dim=8), InvertibleOptions(hidden_dim=8))
    x = torch.randn(40, 16)
    decoupler.initialize(x)
    decoupler.eval()
    torch.testing.assert_close(decoupler.clean(x), decoupler(x).x_clean.detach(), atol=1e-5, rtol=1e-5)
