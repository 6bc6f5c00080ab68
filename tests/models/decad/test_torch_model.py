import pytest
import torch

from anomalib_decad import DecADModel
from anomalib_decad.components import (
    AdversarialSynthesis,
    Decoupler,
    DecouplerOptions,
    DecouplingLossOptions,
    FeatureDecoder,
    InvertibleOptions,
    ViTEncoder,
)
from anomalib_decad.models.decad import AnomalyMapGenerator, DecADLoss


def make_model(decouple=True):
    encoder = ViTEncoder("test_vit", [1, 2, 3], pretrained=False)
    return DecADModel(
        encoder=encoder,
        decoupler=Decoupler(
            encoder.dim, DecouplerOptions(num_prototypes=16, prior_dim=8), InvertibleOptions(hidden_dim=8)
        )
        if decouple
        else None,
        synthesis=AdversarialSynthesis() if decouple else None,
        decoder=FeatureDecoder(encoder.dim, 3, num_heads=encoder.num_heads),
        anomaly_map=AnomalyMapGenerator(),
    )


@pytest.fixture
def model():
    return make_model()


def test_prediction(model):
    prediction = model.eval()(torch.rand(2, 3, 64, 96))
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    assert prediction.pred_score.shape == (2,)


def test_size_may_differ_between_training_and_use(model):
    model.train()(torch.rand(2, 3, 64, 64))
    assert model.eval()(torch.rand(1, 3, 96, 48)).anomaly_map.shape == (1, 1, 96, 48)


def test_every_trainable_parameter_gets_a_gradient_and_the_encoder_none(model):
    terms = DecADLoss()(model.train()(torch.rand(4, 3, 64, 64)))
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("encoder.")), name


def test_loss_is_the_weighted_sum_of_its_terms(model):
    output = model.train()(torch.rand(4, 3, 64, 64))
    terms = DecADLoss(DecouplingLossOptions(5.0, 2.0, 3.0, 4.0, margin=0.7))(output)
    total = sum(value.item() for name, value in terms.items() if name != "loss")
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    perturbed = output.perturbed
    assert terms["normal_energy"].item() == pytest.approx(2 * output.energy[~perturbed].mean().item(), rel=1e-5)
    hinge = (0.7 - output.energy[perturbed]).clamp(min=0).mean().item()
    assert terms["abnormal_energy"].item() == pytest.approx(3 * hinge, rel=1e-5)
    assert terms["prior"].item() == pytest.approx(5 * output.prior_error.mean().item(), rel=1e-5)
    restoration = ((output.x_clean - output.x).square().mean() / output.x.square().mean()).item()
    assert terms["restoration"].item() == pytest.approx(4 * restoration, rel=1e-5)
    assert set(DecADLoss(DecouplingLossOptions(0, 0, 0, 0))(output)) == {"reconstruction", "loss"}


def test_batch_without_perturbed_patches_has_finite_loss(model):
    output = model.train()(torch.rand(2, 3, 64, 64))
    output = output._replace(perturbed=torch.zeros_like(output.perturbed))
    assert torch.isfinite(DecADLoss()(output)["loss"])


@pytest.mark.slow
def test_training_lowers_the_loss(model):
    images, loss = torch.rand(4, 3, 64, 64), DecADLoss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    history = []
    for _ in range(30):
        terms = loss(model(images))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        history.append(torch.stack([terms["loss"], terms["reconstruction"]]).detach())
    start, end = torch.stack(history[:5]).mean(0), torch.stack(history[-5:]).mean(0)
    # The synthetic anomalies follow the decoupler, so its part of the loss falls slowly.
    assert end[0] < 0.9 * start[0]
    assert end[1] < 0.8 * start[1]


def test_synthesis_never_calls_the_encoder(model, monkeypatch):
    features = model.encoder(torch.rand(2, 3, 64, 64))
    monkeypatch.setattr(model.encoder, "forward", lambda *_: pytest.fail("called the encoder"))
    output = model.train().training_output(features, (4, 4))
    assert not output.x.requires_grad
    assert output.x_clean.requires_grad


def test_margin_is_checked():
    with pytest.raises(ValueError, match="margin must be positive"):
        DecADLoss(DecouplingLossOptions(margin=0))


def test_evaluation_before_training_leaves_the_model_uninitialized(model):
    model.eval()(torch.rand(2, 3, 64, 64))
    initialized = [buffer for name, buffer in model.named_buffers() if name.endswith("initialized")]
    assert len(initialized) == 4  # three ActNorms and the model
    assert not any(initialized)
    model.train()(torch.rand(2, 3, 64, 64))
    assert all(initialized)


def test_without_decoupling_it_is_a_plain_reconstruction():
    model = make_model(decouple=False)
    terms = DecADLoss()(model.train()(torch.rand(4, 3, 64, 64)))
    assert terms["loss"].item() == pytest.approx(terms["reconstruction"].item())
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert model.eval().fused((64, 64))(torch.rand(2, 3, 64, 64)).anomaly_map.shape == (2, 1, 64, 64)


def test_preparation_by_a_sample_is_done_once(model):
    model.train()
    model.initialize([torch.randn(50, 64) for _ in range(3)])
    before = {name: value.clone() for name, value in model.named_buffers() if not name.startswith("decoupler")}
    model(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)


def test_preparation_needs_training_mode(model):
    with pytest.raises(RuntimeError, match="training mode"):
        model.eval().initialize([torch.randn(50, 64) for _ in range(3)])
