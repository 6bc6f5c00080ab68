"""UniAD's masked transformer."""

import numpy as np
import pytest
import torch

from anomalib_decad import DecoupledUniAD
from anomalib_decad.components import create_encoder
from anomalib_decad.models.uniad.torch_model import DecoupledUniADModel
from anomalib_decad.models.uniad.transformer import PositionEmbedding, QueryDecoder, TransformerEncoder, neighbor_mask

GRID, DIM = (5, 6), 8


@pytest.mark.parametrize("neighbors", [1, 3, 5])
def test_the_mask_is_the_square_around_each_position(neighbors):
    mask = neighbor_mask(GRID, neighbors).reshape(*GRID, *GRID)
    reach = neighbors // 2
    for row, column in np.ndindex(*GRID):
        square = torch.zeros(GRID, dtype=torch.bool)
        square[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = True
        assert torch.equal(mask[row, column], square)


def test_a_position_is_not_decoded_from_its_neighbors():
    """With one layer, nothing goes around the mask."""
    decoder = QueryDecoder(GRID, DIM, num_layers=1, num_heads=2, neighbors=3).eval()
    positions = torch.randn(30, DIM)
    x = torch.randn(1, DIM, *GRID)
    jacobian = torch.autograd.functional.jacobian(lambda x: decoder(x, positions).square().sum(-1)[0], x)[:, 0]
    influence = jacobian.abs().sum(1).flatten(1) > 0
    # The second attention looks at the embeddings around a position, too, so both reach what is not masked.
    assert not (influence & neighbor_mask(GRID, 3)).any()
    assert influence.any(1).all()


def test_the_size_is_the_reported_one():
    model = DecoupledUniAD(decouple=False).model
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(24.5e6, rel=0.01)


def test_shapes():
    embedding = PositionEmbedding(GRID, DIM)
    positions = embedding()
    assert torch.equal(positions[2 * GRID[1] + 3], torch.cat([embedding.rows[2, 0], embedding.columns[0, 3]]))
    encoder = TransformerEncoder(GRID, DIM, num_layers=2, num_heads=2, neighbors=3)
    embeddings = encoder(torch.randn(2, 30, DIM), positions)
    assert embeddings.shape == (2, DIM, *GRID)
    decoder = QueryDecoder(GRID, DIM, num_layers=2, num_heads=2, neighbors=3)
    assert decoder(embeddings, positions).shape == (2, 30, DIM)


def test_only_training_jitters(weights_of):
    encoder = create_encoder("test_resnet", [1, 2], weights_of("test_resnet"), stages=(0, 1))
    model = DecoupledUniADModel(encoder, (64, 64), hidden_dim=8, num_layers=1, num_heads=2, neighbors=3)
    tokens = torch.randn(2, 5, 7)
    noise = model._with_jitter(tokens) - tokens
    spread = noise.std(dim=(0, 2)) / (20 * tokens.norm(dim=-1).mean(0) / 7)
    assert 0.5 < spread.mean() < 2
    model.eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(images).anomaly_map, model(images).anomaly_map)
