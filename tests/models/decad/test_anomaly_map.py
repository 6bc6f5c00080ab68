import pytest
import torch
from anomalib.models.components import GaussianBlur2d
from torch.nn import functional

from anomalib_decad.components.decoder import patch_errors
from anomalib_decad.models.decad.anomaly_map import AnomalyMapGenerator, AnomalyMapOptions

ONES = torch.ones(2, 12)


def test_perfect_reconstruction_is_no_anomaly():
    features = [torch.randn(2, 12, 8) for _ in range(3)]
    maps, scores = AnomalyMapGenerator()(features, [2 * f for f in features], (3, 4), (30, 40), ONES)
    assert maps.shape == (2, 1, 30, 40)
    torch.testing.assert_close(maps, torch.zeros_like(maps), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, torch.zeros(2), rtol=0, atol=1e-5)


def test_error_shows_where_it_is():
    features = [torch.randn(1, 12, 8)]
    wrong = [features[0].clone()]
    wrong[0][0, 6] *= -1  # row 1, column 2
    maps, scores = AnomalyMapGenerator(AnomalyMapOptions(blur_sigma=1.0))(features, wrong, (3, 4), (30, 40), ONES[:1])
    row, column = divmod(maps.flatten().argmax().item(), 40)
    assert (row // 10, column // 10) == (1, 2)
    assert 1.5 < scores.item() <= 2.001


@pytest.mark.parametrize("sigma", [0.0, 1.3, 4.0])
def test_map_is_that_of_interpolation_and_blur_at_full_resolution(sigma):
    generator = AnomalyMapGenerator(AnomalyMapOptions(blur_sigma=sigma))
    features, reconstructions = ([torch.randn(2, 12, 8) for _ in range(2)] for _ in range(2))
    maps, _ = generator(features, reconstructions, (3, 4), (42, 56), ONES)
    patches = patch_errors(features, reconstructions).view(2, 1, 3, 4)
    expected = functional.interpolate(patches, size=(42, 56), mode="bilinear")
    if sigma:
        size = 2 * int(4 * sigma + 0.5) + 1
        expected = GaussianBlur2d((sigma, sigma), kernel_size=size, border_type="replicate")(expected)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


def test_energy_weighs_the_errors_of_its_patch():
    features, reconstructions = ([torch.randn(2, 12, 8)] for _ in range(2))
    energy = torch.rand(2, 12)
    maps, _ = AnomalyMapGenerator(AnomalyMapOptions(blur_sigma=0, energy_power=0.5))(
        features, reconstructions, (3, 4), (3, 4), energy
    )
    expected = patch_errors(features, reconstructions) * energy.sqrt()
    torch.testing.assert_close(maps.flatten(1), expected)
    maps, _ = AnomalyMapGenerator(AnomalyMapOptions(blur_sigma=0, energy_power=0))(
        features, reconstructions, (3, 4), (3, 4), energy
    )
    torch.testing.assert_close(maps.flatten(1), expected / energy.sqrt())


def test_score_is_the_mean_of_the_largest_values():
    generator = AnomalyMapGenerator(AnomalyMapOptions(blur_sigma=0, score_fraction=0.1))
    features, reconstructions = [torch.randn(2, 12, 8)], [torch.randn(2, 12, 8)]
    maps, scores = generator(features, reconstructions, (3, 4), (30, 40), ONES)
    expected = maps.flatten(1).sort(dim=1, descending=True).values[:, :120].mean(1)
    torch.testing.assert_close(scores, expected)
