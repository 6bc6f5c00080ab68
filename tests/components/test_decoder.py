import pytest
import torch

from anomalib_decad.components import FeatureDecoder


@pytest.mark.parametrize(
    ("depth", "taps", "sources"), [(3, 3, [2, 1, 0]), (6, 3, [5, 3, 1]), (1, 3, [0, 0, 0]), (4, 1, [3])]
)
def test_early_blocks_reconstruct_deep_taps(depth, taps, sources):
    decoder = FeatureDecoder(12, taps, depth, num_heads=2)
    assert [max(source, 0) for source in decoder.sources] == sources
    outputs = decoder(torch.randn(2, 9, 12))
    assert [tuple(output.shape) for output in outputs] == [(2, 9, 12)] * taps


def test_every_parameter_gets_a_gradient():
    decoder = FeatureDecoder(12, 3, 3, num_heads=2)
    sum(output.square().sum() for output in decoder(torch.randn(2, 9, 12))).backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_depth_is_checked():
    with pytest.raises(ValueError, match="decoder_depth"):
        FeatureDecoder(12, 3, 0)
