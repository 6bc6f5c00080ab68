"""The decoupler inside any model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from anomalib_decad.components import (
    DecouplerOptions,
    DecouplingLossOptions,
    EmbeddingDecoupling,
    InvertibleOptions,
    SynthesisOptions,
    attach,
)

SMALL = InvertibleOptions(hidden_dim=8)


class Autoencoder(nn.Module):
    """Anyone's model."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.decoder = nn.ConvTranspose2d(8, 3, 4, 4)

    def forward(self, images):
        return self.decoder(self.encoder(images))


def train(model, decoupling, images, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = functional.mse_loss(model(images), images) + sum(decoupling.losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_a_toy_autoencoder_is_decoupled():
    images = torch.rand(8, 3, 32, 32).sort(dim=-1).values
    model = Autoencoder()
    decoupling = attach(
        model,
        "encoder",
        dim=8,
        decoupler=DecouplerOptions(0.5, num_prototypes=0),
        invertible=InvertibleOptions(hidden_dim=16),
    )
    train(model, decoupling, images)
    error = functional.mse_loss(model(images), images)
    assert error < 0.25 * images.var()
    # Perturbed embeddings have more energy, and removal brings them back towards the clean ones.
    x = model.encoder.layer(images).flatten(2).mT * 5 / decoupling.norm
    perturbed = x + 2.5 * functional.normalize(torch.randn_like(x), dim=-1)
    energy, clean_energy = decoupling.decoupler.energy(perturbed), decoupling.decoupler.energy(x)
    assert energy.mean() > 2 * clean_energy.mean()
    removed = decoupling.decoupler(perturbed)[0]
    assert (removed - x).norm(dim=-1).mean() < 0.9 * (perturbed - x).norm(dim=-1).mean()


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 20, 6)])
def test_maps_and_tokens_are_the_same(shape):
    decoupling = EmbeddingDecoupling(6, invertible=SMALL)
    decoupling(torch.randn(4, 20, 6))
    decoupling.eval()
    x = torch.randn(shape)
    assert decoupling(x).shape == shape
    with pytest.raises(ValueError, match=r"must be of shape \(B, 8, H, W\) or \(B, N, 8\), got .* as dim"):
        EmbeddingDecoupling(8)(x)
    tokens = torch.randn(2, 20, 6)
    expected = decoupling(tokens).mT.unflatten(2, (4, 5))
    torch.testing.assert_close(decoupling(tokens.mT.unflatten(2, (4, 5))), expected)


def test_removal_does_not_depend_on_the_scale_of_the_embeddings():
    x = torch.randn(4, 20, 6)
    small = EmbeddingDecoupling(6, invertible=SMALL)
    large = copy.deepcopy(small)
    torch.manual_seed(1)
    small(x)
    torch.manual_seed(1)
    large(100 * x)
    loaded = EmbeddingDecoupling(6, invertible=SMALL)
    assert not loaded.is_initialized
    loaded.load_state_dict(large.state_dict())
    assert loaded.is_initialized
    small.eval(), large.eval(), loaded.eval()
    torch.testing.assert_close(loaded(x), large(x))
    torch.testing.assert_close(large(100 * x), 100 * small(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(large.norm, 100 * small.norm)


def test_gradients_reach_the_encoder_and_all_parameters():
    decoupling = EmbeddingDecoupling(6, invertible=SMALL, synthesis=SynthesisOptions(fraction=1.0))
    x = torch.randn(4, 20, 6, requires_grad=True)
    y = decoupling(x)
    (y.square().mean() + sum(decoupling.losses().values())).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoupling.parameters())


@pytest.mark.parametrize(
    ("options", "terms"),
    [({}, {"normal_energy", "abnormal_energy", "restoration"}), ({"loss": DecouplingLossOptions(0.0)}, set())],
)
def test_losses_with_a_weight_are_used_once(options, terms):
    decoupling = EmbeddingDecoupling(6, **options)
    decoupling(torch.randn(2, 9, 6))
    assert set(decoupling.losses()) == terms
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no batch went through"):
            decoupling.losses()
        decoupling.eval()(torch.randn(2, 9, 6))


def test_attaching_names_the_layers_there_are():
    with pytest.raises(ValueError, match=r"no submodule 'neck'; it has encoder, encoder\.0"):
        attach(Autoencoder(), "neck", dim=8)
    model = Autoencoder()
    attach(model, "encoder.1", dim=16)
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 8)
