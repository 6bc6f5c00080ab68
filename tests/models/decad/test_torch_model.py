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
    PatchSample,
    ViTEncoder,
    sample_patches,
)
from anomalib_decad.components.decoder import patch_errors
from anomalib_decad.models.decad import AnomalyMapGenerator, DecADLoss


def make_model(decouple=True, num_prototypes=0):
    encoder = ViTEncoder("test_vit", [1, 2, 3], pretrained=False)
    return DecADModel(
        encoder=encoder,
        decoupler=Decoupler(encoder.dim, DecouplerOptions(0.9, num_prototypes), InvertibleOptions(hidden_dim=8))
        if decouple
        else None,
        synthesis=AdversarialSynthesis() if decouple and not num_prototypes else None,
        decoder=FeatureDecoder(encoder.dim, 3, num_heads=encoder.num_heads),
        anomaly_map=AnomalyMapGenerator(),
    )


def train_step(model, images):
    """Prepare a model by images, and give what it returns for them in training mode."""
    model.train().initialize(sample_patches([model.encoder(images)], len(images), 16 * len(images)))
    return model(images)


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("number", [0, 64])
def test_prediction(number):
    model = make_model(num_prototypes=number)
    prediction = model.eval()(torch.rand(2, 3, 64, 96))
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    assert prediction.pred_score.shape == (2,)


def test_size_may_differ_between_training_and_use(model):
    train_step(model, torch.rand(2, 3, 64, 64))
    assert model.eval()(torch.rand(1, 3, 96, 48)).anomaly_map.shape == (1, 1, 96, 48)


@pytest.mark.parametrize(("number", "fixed"), [(0, ("encoder.",)), (64, ("encoder.", "decoupler."))])
def test_what_is_learned_gets_a_gradient(number, fixed):
    model = make_model(num_prototypes=number)
    terms = DecADLoss()(train_step(model, torch.rand(4, 3, 64, 64)))
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(fixed), name


def test_loss_is_the_weighted_sum_of_its_terms(model):
    output = train_step(model, torch.rand(4, 3, 64, 64))
    terms = DecADLoss(DecouplingLossOptions(2.0, 3.0, 4.0, margin=0.7))(output)
    total = sum(value.item() for name, value in terms.items() if name != "loss")
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    perturbed = output.perturbed
    assert terms["normal_energy"].item() == pytest.approx(2 * output.energy[~perturbed].mean().item(), rel=1e-5)
    hinge = (0.7 - output.energy[perturbed]).clamp(min=0).mean().item()
    assert terms["abnormal_energy"].item() == pytest.approx(3 * hinge, rel=1e-5)
    restoration = ((output.x_clean - output.x).square().mean() / output.x.square().mean()).item()
    assert terms["restoration"].item() == pytest.approx(4 * restoration, rel=1e-5)
    assert set(DecADLoss(DecouplingLossOptions(0, 0, 0))(output)) == {"reconstruction", "loss"}


@pytest.mark.parametrize("focal_exponent", [0.0, 1.0, 2.0, 0.5])
def test_a_normal_patch_weighs_by_a_power_of_its_error(model, focal_exponent):
    output = train_step(model, torch.rand(4, 3, 64, 64))
    reconstructions = [item.detach().requires_grad_() for item in output.reconstructions]
    # The first patch is exact, up to rounding: its error may be below 0.
    with torch.no_grad():
        for feature, reconstruction in zip(output.features, reconstructions, strict=True):
            reconstruction[0, 0] = feature[0, 0]
    output = output._replace(reconstructions=reconstructions)
    DecADLoss(focal_exponent=focal_exponent)(output)["reconstruction"].backward()
    errors = patch_errors(output.features, output.reconstructions)
    plain = torch.autograd.grad(errors.mean(), reconstructions)
    weights = errors.detach().clamp(min=1e-6) ** focal_exponent
    assert 0 < output.perturbed.sum() < output.perturbed.numel()
    weights = torch.where(output.perturbed, 1.0, weights / weights[~output.perturbed].mean())
    for actual, expected in zip(reconstructions, plain, strict=True):
        torch.testing.assert_close(actual.grad, expected * weights[..., None])


def test_a_reconstruction_that_is_exact_has_a_finite_loss(model):
    output = train_step(model, torch.rand(2, 3, 64, 64))
    terms = DecADLoss()(output._replace(reconstructions=output.features))
    assert terms["reconstruction"].item() == pytest.approx(0, abs=1e-5)
    for perturbed in (output.perturbed, torch.zeros_like(output.perturbed)):
        assert torch.isfinite(DecADLoss(focal_exponent=100)(output._replace(perturbed=perturbed))["loss"])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "focal_exponent"), [pytest.param(0, 0.0, marks=pytest.mark.exhaustive), (64, 2.0)])
def test_training_lowers_the_loss(number, focal_exponent):
    model = make_model(num_prototypes=number).train()
    # Fitted to the images that it is trained with, it would start where a training ends.
    train_step(model, torch.rand(4, 3, 64, 64))
    images = torch.rand(4, 3, 64, 64)
    loss, plain = DecADLoss(focal_exponent=focal_exponent), DecADLoss(focal_exponent=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(30):
        output = model(images)
        optimizer.zero_grad()
        loss(output)["loss"].backward()
        optimizer.step()
        # All patches alike: the weights change with the errors.
        terms = plain(output)
        history.append(torch.stack([terms["loss"], terms["reconstruction"]]).detach())
    start, end = torch.stack(history[:5]).mean(0), torch.stack(history[-5:]).mean(0)
    # The synthetic anomalies follow the decoupler, so its part of the loss falls slowly.
    assert end[0] < 0.9 * start[0]
    assert end[1] < 0.8 * start[1]


def test_synthesis_never_calls_the_encoder(model, monkeypatch):
    features = model.encoder(torch.rand(2, 3, 64, 64))
    monkeypatch.setattr(model.encoder, "forward", lambda *_: pytest.fail("called the encoder"))
    model.train().initialize(sample_patches([features], 2, 32))
    output = model.training_output(features, (4, 4))
    assert not output.x.requires_grad
    assert output.x_clean.requires_grad


def test_focal_exponent_is_checked():
    with pytest.raises(ValueError, match="focal_exponent must be at least 0, got -1"):
        DecADLoss(focal_exponent=-1)


def test_evaluation_before_training_leaves_the_model_uninitialized(model):
    model.eval()(torch.rand(2, 3, 64, 64))
    initialized = [buffer for name, buffer in model.named_buffers() if name.endswith("initialized")]
    assert len(initialized) == 2  # the network and the model
    assert not any(initialized)
    train_step(model, torch.rand(2, 3, 64, 64))
    assert all(initialized)


def test_without_decoupling_it_is_a_plain_reconstruction():
    model = make_model(decouple=False)
    terms = DecADLoss()(train_step(model, torch.rand(4, 3, 64, 64)))
    assert terms["loss"].item() == pytest.approx(terms["reconstruction"].item())
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert model.eval().fused((64, 64))(torch.rand(2, 3, 64, 64)).anomaly_map.shape == (2, 1, 64, 64)


def test_preparation_by_a_sample_is_done_once(model):
    model.train()
    model.initialize(PatchSample([torch.randn(2, 25, 64) for _ in range(3)], torch.randn(2, 4)))
    before = {name: value.clone() for name, value in model.named_buffers() if not name.startswith("decoupler")}
    model(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)


def test_training_needs_preparation(model):
    with pytest.raises(RuntimeError, match=r"has not been initialized: call initialize\(\)"):
        model.train()(torch.rand(2, 3, 64, 64))


def test_a_training_image_is_not_explained_by_its_own_prototypes():
    model = make_model(num_prototypes=64)
    images = torch.rand(4, 3, 64, 64)
    trained = train_step(model, images)
    with torch.no_grad():
        seen = model.decoupler(trained.x)
    assert seen.energy.mean() < 0.5 * trained.energy.mean()
    # Its own energy is what the mean variance is of.
    assert trained.energy.mean().item() == pytest.approx(1, rel=0.01)


def test_prototypes_are_of_equally_many_patches_of_each_image():
    model = make_model(num_prototypes=24)
    train_step(model, torch.rand(4, 3, 64, 64))
    batches = [model.encoder(torch.rand(4, 3, 64, 64)) for _ in range(3)]
    prototypes = model.prototypes(batches, 8)
    assert prototypes.image.bincount().tolist() == [3] * 8
    assert (prototypes.normal.shape, prototypes.abnormal.shape) == ((24, 6), (24, 58))
    assert len(prototypes.descriptors) == 8


def test_there_are_no_prototypes_with_a_prior_of_0(model):
    with pytest.raises(RuntimeError, match="num_prototypes above 0"):
        model.prototypes([], 1)
