import logging
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, seed_everything
from torchvision.transforms.v2 import Resize

from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.components import EncoderWeightsError
from anomalib_decad.metrics import METRICS, CategoryEvaluator
from anomalib_decad.models.decad import lightning_model
from conftest import losses_of, make_dataset

TERMS = ("loss", "reconstruction")


def test_train_and_test_give_metrics_files_and_thresholds(make_engine, make_model, make_data, capsys):
    engine, model = make_engine(), make_model()
    (results,) = engine.train(model, datamodule=make_data())
    assert set(METRICS) | {"mAD", "bolts/image_AUROC", "cloth/pixel_AUPRO"} <= set(results)
    folder = Path(engine.trainer.default_root_dir)
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["category", "bolts", "cloth", "mean"]
    assert (folder / "metrics.json").is_file()
    assert "cloth" in capsys.readouterr().out
    assert math.isfinite(model.post_processor.image_threshold)
    assert math.isfinite(model.post_processor.pixel_threshold)


@pytest.mark.slow
def test_metrics_are_those_of_the_raw_predictions(make_engine, make_model, make_data):
    model = make_model()
    engine = make_engine()
    engine.fit(model, datamodule=make_data())
    (normalized,) = engine.test(model, datamodule=make_data())
    model.post_processor = None
    (raw,) = make_engine().test(model, datamodule=make_data())
    for name in METRICS:
        assert normalized[name] == pytest.approx(raw[name], abs=1e-6)


@pytest.mark.parametrize(
    ("images", "patches", "products", "expected"),
    [(1024, 32_768, 0, 12 * 16), (1024, 24, 0, 12 * 2), (5, 40, 0, 8 * 8), (1024, 12, 18, 12 * 3)],
)
def test_the_sample_is_of_as_many_patches_as_there_are_images_for(
    images, patches, products, expected, make_engine, make_model, make_data, monkeypatch
):
    monkeypatch.setattr(lightning_model, "_SAMPLE_IMAGES", images)
    monkeypatch.setattr(lightning_model, "_LEAST_PATCHES", patches)
    monkeypatch.setattr(lightning_model, "_PRODUCT_PATCHES", products)
    model = make_model()
    with patch.object(model.model, "initialize", wraps=model.model.initialize) as initialize:
        make_engine(max_steps=1).fit(model, datamodule=make_data())
    assert [rows[..., 0].numel() for rows in initialize.call_args.args[0].features] == [expected] * 3


def test_each_product_has_prototypes_of_its_own_images(make_engine, make_model, make_data):
    model = make_model(decoupler={"num_prototypes": 30})
    make_engine(max_steps=1).fit(model, datamodule=make_data())
    prior = model.model.decoupler.prior
    # Six images of each: five patches of each image.
    assert [prior.of(index).image.bincount().tolist() for index in range(2)] == [[5] * 6] * 2


def test_products_join_and_leave_a_trained_model(make_engine, make_model, make_data, tmp_path, caplog):
    model, engine = make_model(), make_engine(max_steps=2)
    engine.fit(model, datamodule=make_data(categories=["bolts"]))
    engine.trainer.save_checkpoint(tmp_path / "one.ckpt")
    old = model.model.decoupler.prior.of(0)
    both = make_model()
    with caplog.at_level("INFO", logger="anomalib_decad"):
        make_engine(max_steps=4).fit(both, datamodule=make_data(), ckpt_path=tmp_path / "one.ckpt")
    assert "Prototypes of cloth are fitted; those of other products stay." in caplog.text
    prior = both.model.decoupler.prior
    assert both.model.recognizer.names == ["bolts", "cloth"]
    assert all(torch.equal(a, b) for a, b in zip(prior.of(0), old, strict=True))
    assert len(prior.of(1).normal) == len(old.normal)


@pytest.mark.parametrize("settings", [{"synthesis": {"fraction": 0.5}}, {"loss": {"normal_weight": 1.0}}])
def test_what_trains_the_network_needs_a_prior_of_0(settings, make_model):
    with pytest.raises(ValueError, match="set decoupler.num_prototypes to 0, or leave them at 0"):
        make_model(**settings)
    make_model(decoupler={"num_prototypes": 0}, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_resuming_gives_the_losses_of_an_unbroken_run(make_engine, make_model, make_data, tmp_path, sampling):
    data = {"sampling": sampling}
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(), make_data(**data), saver, max_epochs=3)
    resumed = losses_of(
        make_engine, make_model(), make_data(**data), seed=8, max_epochs=3, ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt"
    )
    assert len(unbroken) == 9
    assert resumed == pytest.approx(unbroken[3:], rel=1e-6)


def test_checkpoint_is_safe_complete_and_holds_the_encoder_once(make_engine, make_model, make_data):
    model, engine = make_model(), make_engine()
    engine.fit(model, datamodule=make_data())
    assert {f"train/{term}" for term in TERMS} <= set(engine.trainer.callback_metrics)
    path = engine.trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    keys = [key for key in checkpoint["state_dict"] if "encoder" in key and "blocks.0.attn.qkv.weight" in key]
    assert keys == ["model.encoder.vit.blocks.0.attn.qkv.weight"]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moments = sum(v.numel() for s in checkpoint["optimizer_states"][0]["state"].values() for v in s.values())
    assert moments <= 2 * trainable + len(list(model.parameters()))

    restored = DecAD.load_from_checkpoint(path)
    images = torch.rand(2, 3, 80, 80)
    for a, b in zip(restored.eval()(images), model.eval()(images), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_checkpoint_needs_neither_hub_nor_weights(make_engine, make_model, make_data, monkeypatch):
    engine = make_engine()
    engine.fit(make_model(), datamodule=make_data())
    path = engine.trainer.checkpoint_callback.best_model_path
    monkeypatch.setattr("timm.models.load_state_dict", lambda *_, **__: pytest.fail("read the weights"))
    model = make_model(encoder_weights=None)
    with pytest.raises(EncoderWeightsError):
        make_engine().test(model, datamodule=make_data())
    (results,) = make_engine().test(make_model(encoder_weights=None), datamodule=make_data(), ckpt_path=path)
    assert "image_AUROC" in results
    DecAD.load_from_checkpoint(path)


def test_loss_that_is_not_finite_stops_with_what_to_do(make_engine, make_model, make_data):
    class Break(Callback):
        def on_train_start(self, trainer, pl_module):
            torch.nn.init.constant_(pl_module.model.decoder.heads[0][1].weight, float("inf"))

    with pytest.raises(RuntimeError, match="not finite at step 0 .*reconstruction nan.* Lower learning_rate"):
        make_engine(Break()).fit(make_model(), datamodule=make_data())


@pytest.mark.slow
def test_default_is_fifteen_thousand_steps(make_engine, make_model, make_data, caplog):
    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            self.steps = trainer.max_steps, trainer.max_epochs, trainer.estimated_stepping_batches
            trainer.should_stop = True

    stop = Stop()
    with caplog.at_level(logging.INFO):
        make_engine(stop, max_steps=-1).fit(make_model(), datamodule=make_data())
    assert stop.steps == (15_000, -1, 15_000)
    make_engine(stop, max_epochs=2).fit(make_model(), datamodule=make_data())
    assert stop.steps == (-1, 2, 6)


@pytest.mark.slow
def test_learning_rate_rises_and_falls(make_engine, make_model, make_data):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    make_engine(Rates(), max_steps=16).fit(make_model(learning_rate=0.01, warmup_steps=3), datamodule=make_data())
    assert rates[:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert rates[-1] < 0.001


@pytest.mark.slow
@pytest.mark.parametrize("trainer_value", [None, 1e-4])
def test_gradients_are_clipped_and_the_trainers_value_comes_first(make_engine, make_model, make_data, trainer_value):
    norms = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())

    options = {} if trainer_value is None else {"gradient_clip_val": trainer_value}
    make_engine(Norms(), **options).fit(make_model(gradient_clip_val=1e-2), datamodule=make_data())
    assert max(norms) <= (trainer_value or 1e-2) * 1.01


def test_images_without_masks_leave_the_pixel_metrics_out_and_say_so(make_engine, make_model, mvtec_root, caplog):
    arguments = {"normal_dir": "train/good", "abnormal_dir": "test/square", "normal_test_dir": "test/good"}
    data = MultiCategory(
        "Folder", root=mvtec_root, datamodule_args=arguments, val_split_mode="same_as_test", num_workers=0
    )
    (results,) = make_engine().train(make_model(), datamodule=data)
    assert "image_AUROC" in results
    assert "pixel_AUROC" not in results
    assert "The category bolts: no masks, so there are no pixel metrics" in caplog.text


@pytest.mark.slow
def test_the_evaluator_and_many_categories_work_with_another_model(make_engine, make_data):
    engine = make_engine(max_epochs=1)
    options = {"pre_trained": False, "layers": ["layer1"], "n_features": 8, "visualizer": False}
    model = Padim(backbone="resnet18", evaluator=CategoryEvaluator(), **options)
    (results,) = engine.train(model, datamodule=make_data())
    assert {"mAD", "bolts/image_AUROC"} <= set(results)


def test_predictions_know_their_category(make_engine, make_model, make_data):
    engine, model = make_engine(), make_model()
    engine.fit(model, datamodule=make_data())
    batches = engine.predict(model, datamodule=make_data(), return_predictions=True)
    assert {category for batch in batches for category in batch.category} == {"bolts", "cloth"}
    assert all(batch.pred_label is not None for batch in batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (70, 64)}, "multiples of its patch of 16 x 16 pixels, got 70 x 64; 64 x 64 would do"),
        ({"image_size": (0, 0)}, r"image_size must be two positive numbers, as \[280, 280\], got \[0, 0\]"),
        ({"image_size": (64,)}, "image_size must be two positive numbers"),
        ({"pre_processor": PreProcessor(Resize((70, 64)))}, "multiples of its patch"),
        ({"pre_processor": PreProcessor(Resize((64, 64))), "image_size": (64, 64)}, "image_size belongs to"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"warmup_steps": -3}, "warmup_steps must be at least 0"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val must be at least 0"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"layers": [3, 9]}, "increasing numbers from 1 to 6, the depth of test_vit"),
        ({"encoder": "resnet18"}, "no vision transformer"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(make_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_default_image_is_twenty_patches_and_normalized_as_the_encoder():
    model = DecAD(encoder="test_vit", layers=[1])
    assert tuple(model.input_size) == (320, 320)
    assert model.pre_processor.transform.transforms[1].mean == [0.5, 0.5, 0.5]
    assert tuple(DecAD(encoder="vit_small_patch14_dinov2").input_size) == (280, 280)


@pytest.mark.slow
def test_labels_without_thresholds_are_a_warning(make_engine, make_model, make_data, caplog):
    model = make_model()
    make_engine(limit_val_batches=0).fit(model, datamodule=make_data())
    for use in ("test", "predict"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            getattr(make_engine(), use)(model, datamodule=make_data())
        assert caplog.text.count("never validated, so it has no thresholds") == 1
    model = make_model()
    make_engine().fit(model, datamodule=make_data())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_engine().test(model, datamodule=make_data())
    assert "never validated" not in caplog.text


def test_labels_are_optional_at_test_time():
    batch = ImageBatch(image=torch.rand(1, 3, 8, 8), pred_score=torch.rand(1))
    evaluator = CategoryEvaluator()
    evaluator.on_test_batch_end(SimpleNamespace(world_size=1), None, None, batch, 0)
    assert evaluator.metrics.compute() == {}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_other_precisions_are_refused(precision, make_engine, make_model, make_data):
    with pytest.raises(ValueError, match=f"precision must be one of 32-true, bf16-mixed, 16-mixed, got {precision}"):
        make_engine(precision=precision).fit(make_model(), datamodule=make_data())
    with pytest.raises(ValueError, match="precision must be one of"):
        make_engine(precision=precision).predict(make_model(), datamodule=make_data())


def test_a_model_in_training_mode_does_not_predict(make_model):
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) before"):
        make_model().train()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("argument", ["train_batch_size", "eval_batch_size", "num_workers"])
def test_sizes_of_batches_are_checked(argument, make_data):
    with pytest.raises(ValueError, match=f"{argument} must be at least [01], got -1"):
        make_data(**{argument: -1})


def test_training_images_that_are_least_like_others_come_first(make_engine, make_model, tmp_path):
    make_dataset(tmp_path / "data", ("bolts", "cloth"), num_train=8)
    spoilt = tmp_path / "data" / "cloth" / "train" / "good" / "003.png"
    shutil.copy(tmp_path / "data" / "cloth" / "test" / "square" / "000.png", spoilt)
    engine, model = make_engine(max_steps=1), make_model(report=True)
    engine.train(model, datamodule=MultiCategory("MVTecAD", root=tmp_path / "data", num_workers=0))
    folder = Path(engine.trainer.default_root_dir)
    table = pd.read_csv(folder / "training_images.csv")
    assert sorted(table.category) == ["bolts"] * 8 + ["cloth"] * 8
    assert table.score.is_monotonic_decreasing
    assert table[table.category == "cloth"].image_path.iloc[0] == str(spoilt)
    assert "Training images that are least like others" in (folder / "report.html").read_text()
