import logging

import pytest
import torch
from anomalib.models.components.cluster import KMeans
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components import ConditionalPrior
from anomalib_decad.components import precision as parts_module
from anomalib_decad.components.prior import _KMEANS_ITERATIONS, _cluster


def make_components(count, noise=0.1):
    torch.manual_seed(0)
    normal = torch.randn(count, 6)
    return normal, torch.tanh(normal[:, :4] * normal[:, 1:5]) + noise * torch.randn(count, 4)


@pytest.mark.parametrize(("prototypes", "hidden"), [(256, 0), (256, 64), (1, 128)])
def test_fit_finds_what_depends_on_the_normal_component(prototypes, hidden):
    normal, abnormal = make_components(5000)
    prior = ConditionalPrior(6, 4, prototypes, hidden)
    prior.fit(normal[:4000], abnormal[:4000], num_epochs=64, batch_size=512)
    with torch.no_grad():
        error = (prior(normal[4000:]) - abnormal[4000:]).square().mean()
    assert error < (0.7 if hidden == 0 else 0.4) * abnormal.var()


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=2), scale=st.floats(0.01, 100))
def test_it_is_a_mixture_weighed_by_squared_distances(shape, scale):
    prior = ConditionalPrior(6, 4, 8, 8).double()
    normal = scale * torch.randn(*shape, 6, dtype=torch.float64)
    assert not prior(normal).any()  # at its start
    torch.nn.init.normal_(prior.values)
    distances = torch.cdist(normal.reshape(-1, 6), prior.keys).square().reshape(*shape, 8)
    expected = (-prior.log_beta.exp() * distances).softmax(-1)
    torch.testing.assert_close(prior.weights(normal), expected)
    torch.testing.assert_close(prior(normal), expected @ prior.values.T)


def test_a_prototype_starts_as_the_mean_of_its_members():
    normal = torch.cat([torch.zeros(10, 6), torch.full((30, 6), 5.0)])
    abnormal = torch.cat([torch.randn(10, 4), 7 + torch.randn(30, 4)])
    prior = ConditionalPrior(6, 4, 8, 0)
    prior.fit(normal, abnormal)
    # At a key the mixture is its value: the others are far away, or copies.
    torch.testing.assert_close(prior(normal[:1]), abnormal[:10].mean(0, keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prior(normal[-1:]), abnormal[10:].mean(0, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_fit_takes_few_patches_and_leaves_no_gradients(count, caplog):
    prior = ConditionalPrior(6, 4, 8, 8)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        prior.fit(torch.randn(count, 6), torch.randn(count, 4), num_epochs=3, batch_size=8)
    assert all(parameter.grad is None and parameter.isfinite().all() for parameter in prior.parameters())
    said = f"There are {count} normal patches to choose prototypes from: {count} of 8 prototypes are used, and copied."
    assert (said in caplog.text) == (count < 8)
    prior(torch.randn(5, 6)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in prior.parameters())


def test_every_prototype_is_used_where_there_are_enough_patches():
    prior = ConditionalPrior(6, 4, 64, 0)
    prior.fit(*make_components(1000))
    assert len(prior.keys.unique(dim=0)) == 64
    owners = torch.cdist(make_components(1000)[0], prior.keys).argmin(1)
    assert len(owners.unique()) == 64


def test_is_wide_under_automatic_mixed_precision():
    prior = ConditionalPrior(6, 4, 8, 8)
    x, y = torch.randn(50, 6), torch.randn(50, 4)
    with torch.autocast("cpu", torch.bfloat16):
        prior.fit(x, y, num_epochs=2)
        assert prior(x).dtype == torch.float32
        assert prior.weights(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["num_normal", "num_abnormal", "num_prototypes", "hidden_dim"])
def test_numbers_are_checked(name):
    with pytest.raises(ValueError, match=name):
        ConditionalPrior(**{"num_normal": 2, "num_abnormal": 2, name: -1})


@pytest.mark.parametrize("hidden", [0, 8])
def test_fit_tells_how_far_it_is(hidden):
    parts = []
    ConditionalPrior(6, 4, 32, hidden).fit(*make_components(500), report=parts.append)
    assert len(parts) > 5
    assert parts == sorted(parts)
    assert 0 < parts[0] < 0.5
    assert parts[-1] == 1


@pytest.mark.parametrize("count", [1, 20])
def test_clusters_are_those_of_anomalib(count):
    rows = make_components(300)[0]
    torch.manual_seed(1)
    owners, centers = KMeans(count, _KMEANS_ITERATIONS).fit(rows)
    torch.manual_seed(1)
    ours = _cluster(rows, count, lambda _: None)
    assert torch.equal(ours[0], owners)
    assert torch.equal(ours[1], centers)


def test_a_fit_in_parts_is_the_fit(monkeypatch):
    normal, abnormal = torch.randn(200, 4), torch.randn(200, 12)

    def fitted():
        torch.manual_seed(0)
        prior = ConditionalPrior(4, 12, num_prototypes=9, hidden_dim=8)
        prior.fit(normal, abnormal, num_epochs=2, batch_size=50)
        return prior.state_dict()

    expected = fitted()
    monkeypatch.setattr(parts_module, "_ROWS", 33)
    for name, value in fitted().items():
        torch.testing.assert_close(value, expected[name])


def test_the_sharpness_is_relative_to_the_mean_distance_of_patches_and_keys():
    prior = ConditionalPrior(4, 12, num_prototypes=9, hidden_dim=0)
    normal = 3 + 5 * torch.randn(300, 4)
    prior.fit(normal, torch.randn(300, 12))
    distance = torch.cdist(normal, prior.keys.detach().unique(dim=0)).square().mean()
    assert prior.log_beta.exp().item() * distance.item() == pytest.approx(20, rel=1e-3)
