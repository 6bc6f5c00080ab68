import pytest
import torch

from anomalib_decad.components import FeatureDecoder


@pytest.mark.parametrize(
    ("depth", "layers", "sources"), [(3, 3, [2, 1, 0]), (6, 3, [5, 3, 1]), (1, 3, [0, 0, 0]), (4, 1, [3])]
)
def test_early_blocks_reconstruct_deep_layers(depth, layers, sources):
    decoder = FeatureDecoder(12, layers, depth, num_heads=2)
    assert decoder.sources == sources
    outputs = decoder(torch.randn(2, 9, 12))
    assert [tuple(output.shape) for output in outputs] == [(2, 9, 12)] * layers
    sum(output.square().sum() for output in outputs).backward()
    used = decoder.blocks[: max(sources) + 1], decoder.heads, decoder.linears
    assert all(parameter.grad is not None for part in used for parameter in part.parameters())
    with pytest.raises(ValueError, match="decoder_depth"):
        FeatureDecoder(12, layers, 0)


def test_training_starts_from_the_best_linear_map():
    x, mixing = torch.randn(400, 12), torch.randn(2, 12, 12)
    features = [(x @ matrix).abs() + 3 for matrix in mixing]
    decoder = FeatureDecoder(12, 2, num_heads=2)
    decoder.initialize(x, features)
    with torch.no_grad():
        outputs = decoder(x[None])
    design = torch.cat([x, torch.ones(400, 1)], dim=1)
    for output, feature in zip(outputs, features, strict=True):
        best = design @ torch.linalg.lstsq(design, feature).solution
        assert (output[0] - feature).square().sum() < 1.01 * (best - feature).square().sum()


def test_blocks_see_the_surroundings_once_they_are_trained():
    decoder = FeatureDecoder(12, 1, num_heads=2)
    x = torch.randn(400, 12)
    changed = x[None, :9].clone()
    changed[0, 0] += 1
    assert not torch.allclose(decoder(x[None, :9])[0][0, 1:], decoder(changed)[0][0, 1:])
    decoder.initialize(x, [x])
    torch.testing.assert_close(decoder(x[None, :9])[0][0, 1:], decoder(changed)[0][0, 1:])
