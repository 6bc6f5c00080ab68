"""The three methods as anomalib models: training, checkpoints, exports."""

import cv2
import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.models import ReverseDistillation
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer, seed_everything
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_decad import DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD
from anomalib_decad.components import EncoderWeightsError
from conftest import ENCODER, losses_of

SMALL = {"image_size": (64, 64), "visualizer": False}
METHODS = {
    DecoupledReverseDistillation: {"encoder": "resnet18"},
    DecoupledUniAD: {"encoder": "test_resnet", "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "neighbors": 3},
    DecoupledMambaAD: {"encoder": "resnet18", "depths": [2, 2, 2, 2], "num_directions": 2},
}
CLASSES = list(METHODS)


@pytest.fixture(scope="session")
def make_method(weights_of):
    def make(cls, **kwargs):
        options = {**SMALL, **METHODS[cls], **kwargs}
        if "encoder_weights" not in options:
            options["encoder_weights"] = weights_of(options["encoder"])
        if options["encoder"] == ENCODER:
            options.setdefault("layers", [1, 2, 3])
        return cls(**options)

    return make


every_method = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("decouple", [True, False])
def test_training_changes_all_but_the_encoder_and_gives_metrics(cls, decouple, make_method, make_engine, make_data):
    model, engine = make_method(cls, decouple=decouple), make_engine()
    model.model.encoder.load_weights()
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    engine.fit(model, datamodule=make_data())
    still = {name for name, value in model.model.named_parameters() if torch.equal(value.cpu(), before[name])}
    assert still == {name for name in before if name.startswith("encoder.")}
    assert "train/reconstruction" in engine.trainer.callback_metrics
    assert ("train/normal_energy" in engine.trainer.callback_metrics) == decouple
    (scores,) = engine.test(model, datamodule=make_data())
    assert 0 <= scores["mAD"] <= 1
    assert "bolts/image_AUROC" in scores


@pytest.mark.slow
@every_method
def test_resuming_gives_the_losses_of_an_unbroken_run(cls, make_method, make_engine, make_data, tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    path = tmp_path / "ckpt" / "epoch=0.ckpt"
    seed_everything(7)
    unbroken = losses_of(make_engine, make_method(cls), make_data(), saver, max_epochs=2)
    resumed = losses_of(make_engine, make_method(cls), make_data(), max_epochs=2, ckpt_path=path, seed=1)
    assert resumed == pytest.approx(unbroken[len(unbroken) // 2 :], rel=1e-5)


@every_method
def test_a_checkpoint_knows_the_size_of_an_own_pre_processor(cls, make_method, tmp_path):
    transform = Compose([Resize((96, 96)), Normalize(mean=[0.5] * 3, std=[0.3] * 3)])
    model = make_method(cls, image_size=None, pre_processor=PreProcessor(transform)).eval()
    model.model.encoder.load_weights()
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    # Plain values only: whoever reads the checkpoint needs none of the package's classes.
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    loaded = cls.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.input_size == (96, 96)
    images = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(loaded(images).anomaly_map, model(images).anomaly_map)


@pytest.mark.slow
@every_method
def test_a_checkpoint_needs_neither_hub_nor_weights(cls, make_method, make_engine, make_data, monkeypatch):
    engine = make_engine()
    engine.fit(make_method(cls), datamodule=make_data())
    path = engine.trainer.checkpoint_callback.best_model_path
    monkeypatch.setattr("timm.models.load_state_dict", None)
    model = cls.load_from_checkpoint(path).eval()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.model(images).anomaly_map, engine.model.eval().model(images).anomaly_map)
    other = make_method(cls, decouple=False)
    message = f"of another {cls.__name__}: leave out .* give it the arguments --model.decouple True"
    with pytest.raises(ValueError, match=message):
        engine.test(other, datamodule=make_data(), ckpt_path=path)


def test_without_decoupling_it_is_anomalibs_reverse_distillation(make_method):
    mine = make_method(DecoupledReverseDistillation, decouple=False)
    theirs = ReverseDistillation(backbone="resnet18", pre_trained=False)
    mine.model.encoder.load_weights()
    theirs.model.encoder.feature_extractor.load_state_dict(mine.model.encoder.cnn.state_dict())
    theirs.model.bottleneck.load_state_dict(mine.model.bottleneck.state_dict(), strict=False)
    theirs.model.decoder.load_state_dict(mine.model.decoder.state_dict())
    theirs.model.anomaly_map_generator.image_size = (64, 64)
    images = torch.rand(2, 3, 64, 64)
    mine.train(), theirs.train()
    torch.testing.assert_close(mine.model(images), theirs.model(images))
    mine.eval(), theirs.eval()
    actual, expected = mine.model(images), theirs.model(images)
    torch.testing.assert_close(actual.pred_score, expected.pred_score.flatten())
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map)


@pytest.mark.slow
@every_method
def test_a_vision_transformer_can_be_the_encoder_and_bfloat16_the_precision(cls, make_method, make_engine, make_data):
    model = make_method(cls, encoder=ENCODER, image_size=(128, 128))
    losses = losses_of(make_engine, model, make_data(), max_steps=1, precision="bf16-mixed")
    assert np.isfinite(losses).all()
    output = model.eval().model(torch.rand(2, 3, 128, 128))
    assert output.anomaly_map.shape == (2, 1, 128, 128)
    assert output.pred_score.numel() == 2


@pytest.mark.slow
@pytest.mark.parametrize("cls", [CLASSES[0], *(pytest.param(cls, marks=pytest.mark.exhaustive) for cls in CLASSES[1:])])
def test_exports_give_the_checkpoints_predictions(cls, make_method, make_engine, make_data, mvtec_root, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    model, engine = make_method(cls), make_engine(max_steps=4)
    engine.fit(model, datamodule=make_data())
    batches = engine.predict(model, data_path=mvtec_root / "bolts" / "test" / "square")
    items = {item.image_path: item for batch in batches for item in batch}

    path = model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(str(path))
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.name for output in session.get_outputs()]
    images = np.stack([read_image(image_path) for image_path in items]).astype(np.float32).transpose(0, 3, 1, 2) / 255
    for outputs in (session.run(None, {"input": images}), compiled(images).values()):
        exported = dict(zip(names, outputs, strict=True))
        for index, item in enumerate(items.values()):
            score = exported["pred_score"].reshape(-1)[index]
            np.testing.assert_allclose(score, item.pred_score.item(), rtol=1e-3, atol=1e-3)
            anomaly_map = item.anomaly_map.squeeze().numpy()
            np.testing.assert_allclose(exported["anomaly_map"][index, 0], anomaly_map, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_integers_hold_the_convolutions(make_method, make_engine, make_data, mvtec_root, tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model = make_method(DecoupledReverseDistillation)
    make_engine(max_steps=4).fit(model, datamodule=make_data())
    path = model.to_openvino(tmp_path, compression_type="int8_ptq", datamodule=make_data())
    operations = openvino.Core().read_model(path).get_ops()
    convolutions = [operation for operation in operations if operation.get_type_name() == "Convolution"]
    inputs = [operation.input_value(0).get_node().get_type_name() for operation in convolutions]
    # All but the first, and the blur of the anomaly map.
    assert inputs.count("FakeQuantize") >= len(convolutions) - 2 > 20
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for image_path in sorted((mvtec_root / "bolts" / "test" / "square").iterdir()):
        image = read_image(image_path).astype(np.float32).transpose(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(image)).anomaly_map.flatten()
        actual = torch.from_numpy(compiled(image)["anomaly_map"]).flatten()
        assert torch.corrcoef(torch.stack([actual, expected]))[0, 1] > 0.9


def read_image(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


@every_method
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (60, 64)}, "multiples of 32 pixels, got 60 x 64; 64 x 64 would do"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"decoupling_learning_rate": 0}, "decoupling_learning_rate must be positive"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"delta": 0}, "delta must be positive"),
        ({"encoder": "resnet1", "encoder_weights": None}, "close names are"),
        ({"encoder_weights": "nowhere.pth"}, "no such file: nowhere.pth"),
        ({"layers": [1, 2, 9]}, "with the stages"),
        ({"image_size": (64, 64), "pre_processor": False}, "belongs to the default pre_processor"),
        (
            {"image_size": None, "pre_processor": PreProcessor(transform=Normalize([0.5] * 3, [0.5] * 3))},
            "have the pre_processor resize",
        ),
    ],
)
def test_bad_arguments_are_refused(cls, arguments, message, make_method):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_method(cls, **arguments)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DecoupledReverseDistillation, {"encoder": "test_resnet"}, "has no decoder for test_resnet"),
        (DecoupledUniAD, {"hidden_dim": 9}, "multiple of num_heads"),
        (DecoupledUniAD, {"jitter": -1}, "jitter must be at least 0"),
        (DecoupledUniAD, {"neighbors": 9}, "use larger images"),
        (DecoupledUniAD, {"neighbors": 4}, "neighbors must be an odd positive number"),
        (DecoupledMambaAD, {"encoder": "test_efficientnet"}, "double their channels"),
        (DecoupledMambaAD, {"depths": [2, 2, 2]}, "four numbers"),
        (DecoupledMambaAD, {"depths": [5, 2, 2, 2]}, "multiples of 2 or 3"),
        (DecoupledMambaAD, {"num_directions": 1}, "num_directions must be"),
    ],
)
def test_arguments_of_one_method_are_refused(cls, arguments, message, make_method):
    with pytest.raises(ValueError, match=message):
        make_method(cls, **arguments)


@every_method
def test_missing_weights_stop_the_training_with_what_to_do(cls, make_engine, make_method, make_data):
    model = make_method(cls, encoder_weights=None)
    with pytest.raises(EncoderWeightsError, match="not on this machine and could not be downloaded"):
        make_engine().fit(model, datamodule=make_data())
