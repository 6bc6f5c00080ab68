import pytest
import torch

from anomalib_decad.components import FeatureStandardiser, fuse


def test_channels_get_mean_zero_and_variance_one_over_the_training_images():
    standardiser = FeatureStandardiser(4, 2).train()
    scale, shift = torch.tensor([1.0, 100.0, 0.01, 5.0]), torch.tensor([0.0, 1000.0, -3.0, 1.0])
    data = [torch.randn(40, 25, 4) * scale * (tap + 1) + shift for tap in range(2)]
    for start in range(0, 40, 8):
        standardiser([tap[start : start + 8] for tap in data])
    standardiser.eval()
    for output in standardiser(data):
        torch.testing.assert_close(output.mean((0, 1)), torch.zeros(4), rtol=0, atol=2e-2)
        torch.testing.assert_close(output.std((0, 1)), torch.ones(4), rtol=2e-2, atol=0)


def test_evaluation_changes_no_statistics():
    standardiser = FeatureStandardiser(4, 1).train()
    standardiser([torch.randn(8, 25, 4)])
    before = [buffer.clone() for buffer in standardiser.buffers()]
    standardiser.eval()([torch.randn(8, 25, 4) + 5])
    assert all(torch.equal(a, b) for a, b in zip(before, standardiser.buffers(), strict=True))


def test_fusion_is_the_scaled_mean():
    taps = [torch.randn(2, 9, 4) for _ in range(3)]
    torch.testing.assert_close(fuse(taps), sum(taps) / 3 * 5 / 4**0.5)


@pytest.mark.parametrize("dim", [64, 384, 768])
def test_norm_does_not_depend_on_the_width(dim):
    correlated = torch.randn(4, 25, dim)
    taps = [0.7 * correlated + 0.7 * torch.randn(4, 25, dim) for _ in range(3)]
    assert 3 < fuse(taps).norm(dim=-1).mean() < 5
