import pytest
import torch

from anomalib_decad.components import FeatureDecoder


@pytest.mark.parametrize(
    ("depth", "taps", "sources"), [(3, 3, [2, 1, 0]), (6, 3, [5, 3, 1]), (1, 3, [0, 0, 0]), (4, 1, [3])]
)
def test_early_blocks_reconstruct_deep_taps(depth, taps, sources):
    decoder = FeatureDecoder(12, taps, depth, num_heads=2, num_prototypes=5)
    assert [max(source, 0) for source in decoder.sources] == sources
    outputs = decoder(torch.randn(2, 9, 12))
    assert [tuple(output.shape) for output in outputs] == [(2, 9, 12)] * taps


@pytest.mark.parametrize("num_prototypes", [0, 5])
def test_every_parameter_gets_a_gradient(num_prototypes):
    decoder = FeatureDecoder(12, 3, 3, num_heads=2, num_prototypes=num_prototypes)
    sum(output.square().sum() for output in decoder(torch.randn(2, 9, 12))).backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_depth_is_checked():
    with pytest.raises(ValueError, match="decoder_depth"):
        FeatureDecoder(12, 3, 0)


def test_training_starts_from_the_best_linear_map_of_what_is_remembered():
    x, mixing = torch.randn(400, 12), torch.randn(2, 12, 12)
    features = [x @ matrix + 3 for matrix in mixing]
    decoder = FeatureDecoder(12, 2, num_heads=2, num_prototypes=40)
    decoder.initialize(x, features)
    with torch.no_grad():
        remembered = decoder.memory(x)
        outputs = decoder(x[None])
    design = torch.cat([remembered, torch.ones(400, 1)], dim=1)
    for output, feature in zip(outputs, features, strict=True):
        best = design @ torch.linalg.lstsq(design, feature).solution
        assert (output[0] - feature).square().sum() < 1.01 * (best - feature).square().sum()


def test_an_anomaly_cannot_be_copied_before_training():
    """Where the memory returns the same, so does the decoder, however far away the input is."""
    x = torch.randn(400, 12)
    decoder = FeatureDecoder(12, 1, num_heads=2, num_prototypes=40)
    decoder.initialize(x, [x])
    anomaly = 50 * torch.randn(1, 30, 12)
    assert decoder(anomaly)[0].norm(dim=-1).max() < 2 * x.norm(dim=-1).max()
