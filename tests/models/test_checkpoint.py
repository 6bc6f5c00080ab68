"""What a checkpoint says, and what the user says."""

from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torchvision.transforms.v2 import Resize

from anomalib_decad import DecAD, DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD
from anomalib_decad.components import DecouplerOptions, InvertibleOptions
from anomalib_decad.models.checkpoint import default_arguments
from anomalib_decad.models.decad import AnomalyMapOptions
from conftest import TINY

#: Arguments that matter in training alone, or for what a run writes: a checkpoint can be used with others.
OTHER_ARGUMENTS = {
    "decoupling_learning_rate", "delta", "encoder_weights", "evaluator", "feature_cache",
    "feature_cache_dir", "feature_cache_limit", "focal_exponent", "gradient_clip_val", "jitter", "learning_rate",
    "loss", "max_steps", "post_processor", "pre_processor", "report", "save_maps", "synthesis", "visualizer",
    "warmup_steps", "weight_decay", "kwargs",
}  # fmt: skip


@pytest.mark.parametrize("cls", [DecAD, DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD])
def test_each_argument_is_either_the_models_or_the_trainings(cls):
    """A new argument has to be put on one of the lists."""
    names = set(default_arguments(cls)) - set(default_arguments(LightningModule)) - {"self", "args", "params"}
    assert names == (cls.architecture | OTHER_ARGUMENTS) & names
    assert not cls.architecture - names
    assert not cls.architecture & OTHER_ARGUMENTS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, mvtec_root, encoder_weights):
    """A trained model with an unusual argument of each kind, and its checkpoint."""
    from anomalib.engine import Engine

    from anomalib_decad import MultiCategory

    model = DecAD(
        **{**TINY, "layers": [1, 2]}, encoder_weights=encoder_weights, image_size=(112, 112), visualizer=False,
        decoder_depth=1, anomaly_map=AnomalyMapOptions(blur_sigma=1.0, score_fraction=0.1, energy_power=0.5),
    )  # fmt: skip
    data = MultiCategory("MVTecAD", root=mvtec_root, num_workers=0, train_batch_size=4)
    engine = Engine(
        default_root_dir=tmp_path_factory.mktemp("trained"), accelerator="cpu", max_steps=3, enable_progress_bar=False
    )
    engine.fit(model, datamodule=data)
    return model.eval(), engine.trainer.checkpoint_callback.best_model_path


@pytest.fixture
def images():
    return torch.rand(3, 3, 90, 70)


def loaded(make_engine, make_data, path, **arguments):
    """Load a checkpoint into a model of arguments, as the command line does."""
    model = DecAD(visualizer=False, **arguments)
    make_engine().test(model, datamodule=make_data(), ckpt_path=path)
    return model.eval()


def test_a_checkpoint_needs_no_argument(checkpoint, make_engine, make_data, images):
    model, path = checkpoint
    other = loaded(make_engine, make_data, path)
    with torch.inference_mode():
        expected, actual = model(images), other(images)
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(actual.pred_score, expected.pred_score)
    assert torch.equal(actual.pred_label, expected.pred_label)
    assert other.input_size == (112, 112)


def test_a_training_goes_on_without_the_models_arguments(checkpoint, make_engine, make_data, encoder_weights):
    model, path = checkpoint
    resumed = DecAD(visualizer=False, encoder_weights=encoder_weights, learning_rate=1e-5)
    make_engine(max_steps=5, limit_val_batches=0).fit(resumed, datamodule=make_data(), ckpt_path=path)
    assert resumed.hparams["layers"] == [1, 2]
    assert resumed.hparams["learning_rate"] == 1e-5
    weights = dict(resumed.model.decoder.named_parameters())
    assert any(not torch.equal(value, weights[name]) for name, value in model.model.decoder.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [1, 2, 3]}, r"leave out layers, .* --model.layers \[1,2\]"),
        ({"encoder": "vit_small_patch14_dinov2"}, "leave out encoder, .* --model.encoder test_vit"),
        ({"image_size": (70, 70)}, r"leave out image_size, .* --model.image_size \[112,112\]"),
        ({"decoder_depth": 3}, "--model.decoder_depth 1"),
        ({"decoupler": DecouplerOptions(num_prototypes=9)}, "--model.decoupler.num_prototypes 64"),
        ({"invertible": InvertibleOptions(lipschitz=0.3)}, "--model.invertible.lipschitz 0.9"),
        ({"anomaly_map": AnomalyMapOptions(blur_sigma=0)}, "--model.anomaly_map.blur_sigma 1.0"),
        ({"anomaly_map": AnomalyMapOptions(energy_power=1)}, "--model.anomaly_map.energy_power 0.5"),
    ],
)
def test_an_argument_that_contradicts_the_checkpoint_is_an_error(
    arguments, message, checkpoint, make_engine, make_data
):
    _, path = checkpoint
    loads = [DecAD.load_from_checkpoint]
    if "layers" in arguments or "invertible" in arguments:
        loads.append(partial(loaded, make_engine, make_data))
    for load in loads:
        with pytest.raises(ValueError, match=f"the checkpoint is of another DecAD: .*{message}"):
            load(path, **arguments)


def test_arguments_that_the_checkpoint_has_are_no_error(checkpoint, make_engine, make_data):
    _, path = checkpoint
    arguments = {"layers": [1, 2], "image_size": (112, 112), "decoder_depth": 1}
    loaded(make_engine, make_data, path, **arguments)
    DecAD.load_from_checkpoint(path, **arguments)


def test_the_default_size_may_be_named(make_model, tmp_path):
    model, path = make_model(image_size=None), tmp_path / "model.ckpt"
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    size = tuple(model.input_size)
    assert DecAD.load_from_checkpoint(path, image_size=size).input_size == size


def test_a_pre_processor_of_the_users_sets_the_size(checkpoint):
    _, path = checkpoint
    model = DecAD.load_from_checkpoint(path)
    model.pre_processor = PreProcessor(Resize((32, 32)))
    assert model.input_size == (32, 32)
    model.post_processor.image_sensitivity = 0.9
    assert model.post_processor.raw_threshold("image") < model.post_processor.limits().image_threshold


def test_loggers_get_plain_values(make_model, make_engine, make_data, tmp_path):
    make_engine(logger=CSVLogger(tmp_path), limit_val_batches=0).fit(make_model(), datamodule=make_data())
    text = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert "num_prototypes: 64" in text


@pytest.mark.parametrize("use", ["export", "test"])
def test_what_is_no_checkpoint_of_the_model_is_a_line(use, checkpoint, make_engine, make_data, tmp_path):
    _, path = checkpoint
    content = torch.load(path, weights_only=True)

    def broken(name, change):
        other = {**content, "state_dict": dict(content["state_dict"])}
        change(other)
        torch.save(other, tmp_path / name)
        return tmp_path / name

    def with_nan(other):
        other["state_dict"]["model.decoder.heads.0.1.bias"] = torch.full((16,), float("nan"))

    (tmp_path / "part.ckpt").write_bytes(Path(path).read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save([1.0], tmp_path / "list.ckpt")
    cases = {
        tmp_path / "gone.ckpt": r"Checkpoint file not found: .*gone\.ckpt",
        tmp_path / "part.ckpt": r"part\.ckpt is no checkpoint, or only a part of one",
        tmp_path / "text.ckpt": r"text\.ckpt is no checkpoint, or only a part of one",
        tmp_path / "list.ckpt": r"list\.ckpt is no checkpoint of a training",
        broken("old.ckpt", lambda other: other.update(anomalib_decad_format=1)): "of another version of anomalib-decad",
        broken("none.ckpt", lambda other: other.pop("anomalib_decad_format")): "it is no checkpoint of a DecAD",
        broken("uniad.ckpt", lambda other: other.update(anomalib_decad_model="X")): "is of a X: give --model X",
        broken("nan.ckpt", with_nan): r"weights are damaged: model\.decoder\.heads\.0\.1\.bias has NaN",
    }
    load, chosen = DecAD.load_from_checkpoint, list(cases.items())
    if use == "test":  # a part of a file, another version, and NaN
        load, chosen = partial(loaded, make_engine, make_data), chosen[1::3]
    for file, message in chosen:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(file)
