import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components import FeatureFusion, FeatureStandardizer


def features(dim=6, taps=3, count=500, seed=0):
    """Correlated channels of very different means and scales."""
    torch.manual_seed(seed)
    mixing = torch.randn(dim, dim)
    scale, shift = 10 ** torch.linspace(-2, 2, dim), 10 * torch.randn(dim)
    return [torch.randn(count, dim) @ mixing * scale * (tap + 1) + shift for tap in range(taps)]


def covariance(rows):
    return torch.cov(rows.double().T)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_standardized_directions_are_uncorrelated_with_the_root_of_their_variance_left(seed):
    data = features(seed=seed)
    standardizer = FeatureStandardizer(6, 3)
    standardizer.initialize(data)
    for tap, output in zip(data, standardizer(data), strict=True):
        # Of the channels at variance 1: the correlation matrix.
        variances = torch.linalg.eigvalsh(torch.corrcoef(tap.double().T)).clamp(min=1e-7)
        got = covariance(output)
        torch.testing.assert_close(output.mean(0), torch.zeros(6), rtol=0, atol=2e-2)
        torch.testing.assert_close(got, torch.diag(variances.sqrt()), rtol=2e-2, atol=2e-2)


def test_standardization_ignores_shifts_and_scales_of_channels():
    data = features()
    scaled = [tap * torch.linspace(0.5, 50, 6) + 3 for tap in data]
    outputs = []
    for version in (data, scaled):
        standardizer = FeatureStandardizer(6, 3)
        standardizer.initialize(version)
        outputs.append(torch.stack(standardizer(version)))
    # The axes' signs are free; norms are not.
    torch.testing.assert_close(outputs[0].norm(dim=-1), outputs[1].norm(dim=-1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dim", [8, 64, 384])
def test_embeddings_have_norm_five_whatever_the_width_and_the_scale(dim):
    data = [1000 * tap for tap in features(dim)]
    fusion = FeatureFusion(dim)
    fusion.initialize(data)
    assert fusion(data).square().sum(-1).mean().sqrt().item() == pytest.approx(5, rel=1e-3)


def test_the_first_channels_of_an_embedding_vary_least():
    data = features(16)
    fusion = FeatureFusion(16)
    fusion.initialize(data)
    variances = fusion(data).var(0)
    assert (variances.diff() > -1e-4).all()


def test_a_single_patch_and_constant_features_are_no_error():
    for data in ([torch.randn(1, 6)] * 3, [torch.ones(40, 6)] * 3):
        standardizer, fusion = FeatureStandardizer(6, 3), FeatureFusion(6)
        standardizer.initialize(data)
        fusion.initialize(data)
        assert all(torch.isfinite(output).all() for output in [*standardizer(data), fusion(data)])
