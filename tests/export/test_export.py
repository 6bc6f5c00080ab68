"""Exports predict what the checkpoint predicts: every format, runtime and image size."""

import json
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from torch.nn.utils import parametrize
from torchvision.transforms.v2 import Compose, Normalize, Resize

import products
from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.components import DecouplerOptions, InvertibleOptions
from anomalib_decad.export.pre_processor import MatrixResize, for_export
from anomalib_decad.thresholds import CategoryPostProcessor
from conftest import BENCHMARKS, ENCODER, ROOT

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

SIZE = (64, 80)
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two products, with and without defects."""
    root = tmp_path_factory.mktemp("data") / "products"
    products.build(root, ["brick", "gear"], train=40, good=8, each=1, size=140)
    return root


@pytest.fixture(scope="module")
def datamodule(data):
    return MultiCategory("MVTecAD", root=data, categories=["brick", "gear"], num_workers=0, train_batch_size=8)


@pytest.fixture(scope="module")
def checkpoint(datamodule, encoder_weights, tmp_path_factory):
    torch.manual_seed(0)
    model = DecAD(
        encoder=ENCODER, encoder_weights=encoder_weights, layers=[1, 2, 3], image_size=SIZE,
        decoupler=DecouplerOptions(num_prototypes=64),
        invertible=InvertibleOptions(hidden_dim=16, num_units=1),
    )  # fmt: skip
    engine = Engine(
        max_steps=60, logger=False, accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("run"), devices=1
    )
    engine.fit(model, datamodule=datamodule)
    path = Path(engine.best_model_path or engine.trainer.checkpoint_callback.best_model_path)
    assert path.is_file()
    return path


@pytest.fixture(scope="module")
def images(data, tmp_path_factory):
    """A folder with images of several sizes and shapes."""
    folder = tmp_path_factory.mktemp("images")
    # None as it was validated: a score that is the threshold itself may fall to either side of it.
    sizes = ((272, 288), (64, 80), (50, 60), (300, 111), (97, 210), (64, 80))
    sources = sorted(data.glob("brick/test/crack_*/*.png"))[:3] + sorted(data.glob("gear/test/good/*.png"))[:3]
    for index, (source, (height, width)) in enumerate(zip(sources, sizes, strict=True)):
        image = cv2.resize(cv2.imread(str(source)), (width, height), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def expected(checkpoint, images):
    """What ``Engine.predict`` gives for the folder."""
    return predict(DecAD.load_from_checkpoint(checkpoint), images)


@pytest.fixture(scope="module")
def export(checkpoint, datamodule, tmp_path_factory):
    """Export once for each set of arguments, through the Engine."""
    done = {}

    def run(kind, input_size=None, compression=None):
        key = kind, input_size, compression
        if key not in done:
            done[key] = Engine(logger=False, accelerator="cpu").export(
                DecAD.load_from_checkpoint(checkpoint),
                kind,
                export_root=tmp_path_factory.mktemp("export"),
                input_size=input_size,
                compression_type=compression,
                datamodule=datamodule if compression else None,
            )
        return done[key]

    return run


def predict(model, images):
    """Predict the images of a folder with the Engine."""
    batches = Engine(logger=False, accelerator="cpu").predict(model, data_path=images[0].parent)
    items = {Path(item.image_path): item for batch in batches for item in batch}
    return [items[path] for path in images]


def read(path):
    """Read an image as bytes, shape (H, W, 3), RGB."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def assert_agrees(prediction, item, tolerance=1e-4, decisions=True):
    score = float(np.ravel(prediction["pred_score"])[0])
    assert score == pytest.approx(float(item.pred_score), rel=tolerance)
    map_, expected_map = np.squeeze(np.asarray(prediction["anomaly_map"])), item.anomaly_map.squeeze().numpy()
    assert np.linalg.norm(map_ - expected_map) <= tolerance * np.linalg.norm(expected_map)
    if decisions:
        assert bool(np.ravel(prediction["pred_label"])[0]) == bool(item.pred_label)
        mask, expected_mask = np.squeeze(np.asarray(prediction["pred_mask"])), item.pred_mask.squeeze().numpy()
        assert (mask != expected_mask).mean() <= 10 * tolerance


def assert_resembles(prediction, item):
    assert float(np.ravel(prediction["pred_score"])[0]) == pytest.approx(float(item.pred_score), abs=0.1)
    maps = np.ravel(prediction["anomaly_map"]), item.anomaly_map.numpy().ravel()
    # Most of a map may be clipped to 1, which leaves little to correlate.
    assert np.corrcoef(*maps)[0, 1] > 0.95 or np.abs(maps[0] - maps[1]).mean() < 0.02


def assert_usual(items):
    """The comparison means something: scores and maps vary."""
    scores = torch.stack([item.pred_score.reshape(()) for item in items])
    assert scores.std() > 1e-2
    assert all(item.anomaly_map.std() > 1e-3 for item in items)


def torch_model(path):
    model = torch.load(path, weights_only=False)["model"].eval()
    return torch.inference_mode()(lambda batch: model(torch.from_numpy(batch))._asdict())


def onnx_session(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, session.run(None, {"input": batch}), strict=True))


def openvino_model(path, config=FLOAT32):
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    return lambda batch: {next(iter(key.names)): value for key, value in compiled([batch]).items()}


def array(image):
    return (image.astype(np.float32) / 255).transpose(2, 0, 1)[None]


def test_torch_inferencer(export, images, expected, monkeypatch):
    assert_usual(expected)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(export("torch"), device="cpu")
    for path, item in zip(images, expected, strict=True):
        image = read(path)
        for source in (path, image, (image / 255).astype(np.float32), torch.from_numpy(array(image))):
            with torch.no_grad():
                assert_agrees(vars(inferencer.predict(source)), item)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_openvino_inferencer(kind, export, images, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it writes a cache
    inferencer = OpenVINOInferencer(export(kind), device="CPU", config=FLOAT32)
    for path, item in zip(images, expected, strict=True):
        image = read(path)
        for source in (path, image, (image / 255).astype(np.float32)):
            assert_agrees(vars(inferencer.predict(source)), item)


@pytest.mark.parametrize(("runtime", "kind"), [(onnx_session, "onnx"), (openvino_model, "openvino")])
def test_plain_runtimes_with_images_of_any_size(runtime, kind, export, images, expected):
    model = runtime(export(kind))
    for path, item in zip(images, expected, strict=True):
        assert_agrees(model(array(read(path))), item)


@pytest.mark.parametrize(
    ("runtime", "kind", "index"),
    [pytest.param(onnx_session, "onnx", 0, marks=pytest.mark.exhaustive), (openvino_model, "openvino", 1)],
)
def test_exports_for_one_size_take_batches(runtime, kind, index, export, images, expected):
    image = array(read(images[index]))
    model = runtime(export(kind, input_size=image.shape[2:]))
    outputs = model(np.concatenate([image, 1 - image, image]))
    for row in (0, 2):
        assert_agrees({name: value[row] for name, value in outputs.items()}, expected[index])
    with pytest.raises(Exception, match=r"(?i)dimension|shape"):
        model(image[:, :, :-1])


def test_dynamic_batches_equal_single_images(export, images):
    images = [array(read(path)) for path in images if read(path).shape[:2] == SIZE]
    assert len(images) == 2
    model = onnx_session(export("onnx"))
    together = model(np.concatenate(images))
    for row, image in enumerate(images):
        np.testing.assert_allclose(together["anomaly_map"][row], model(image)["anomaly_map"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_half_precision_file(export, images, expected):
    path = export("openvino", compression="fp16")
    assert path.with_suffix(".bin").stat().st_size < 0.6 * export("openvino").with_suffix(".bin").stat().st_size
    model = openvino_model(path)
    for image, item in zip(images, expected, strict=True):
        assert_agrees(model(array(read(image))), item, tolerance=1e-2, decisions=False)


def test_half_precision_arithmetic_keeps_the_resizing(export, images, expected):
    """Runtimes choose bfloat16 by themselves where the machine has it."""
    model = openvino_model(export("openvino"), {"INFERENCE_PRECISION_HINT": "bf16"})
    for image, item in zip(images, expected, strict=True):
        assert_resembles(model(array(read(image))), item)


@pytest.mark.parametrize(
    ("compression", "input_size"),
    [
        pytest.param("int8", None, marks=pytest.mark.exhaustive),
        ("int8_ptq", None),
        pytest.param("int8_ptq", (48, 64), marks=pytest.mark.exhaustive),
    ],
)
def test_integers(compression, input_size, export, images, expected):
    path = export("openvino", input_size=input_size, compression=compression)
    assert path.with_suffix(".bin").stat().st_size < 0.8 * export("openvino").with_suffix(".bin").stat().st_size
    model = openvino_model(path)
    for image, item in zip(images, expected, strict=True):
        if input_size is None:
            assert_resembles(model(array(read(image))), item)
    if input_size:
        outputs = model(np.random.rand(2, 3, *input_size).astype(np.float32))
        assert outputs["anomaly_map"].shape == (2, 1, *SIZE)


def never_validated(checkpoint):
    model = DecAD.load_from_checkpoint(checkpoint)
    model.post_processor.follow([])
    for name, buffer in model.post_processor.named_buffers():
        if name.rsplit("_", 1)[-1] in {"min", "max", "threshold"}:
            buffer.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("kind", "compression"),
    [("torch", None), ("onnx", None), pytest.param("openvino", "int8_ptq", marks=pytest.mark.exhaustive)],
)
def test_a_model_that_was_never_validated(kind, compression, checkpoint, datamodule, images, tmp_path, caplog):
    model = never_validated(checkpoint)
    items = predict(model, images)
    path = Engine(logger=False, accelerator="cpu").export(
        model, kind, export_root=tmp_path, compression_type=compression, datamodule=datamodule if compression else None
    )
    assert "never validated" in caplog.text
    assert model.post_processor.enable_normalization
    run = {"torch": torch_model, "onnx": onnx_session, "openvino": openvino_model}[kind](path)
    for image, item in zip(images, items, strict=True):
        (assert_resembles if compression else assert_agrees)(run(array(read(image))), item)
    if kind == "onnx":
        # The example says so, and keeps equally named images of two folders apart.
        (tmp_path / "other").mkdir()
        shutil.copy(images[0], tmp_path / "other")
        lines = run_example("onnx", path, [images[0], tmp_path / "other" / images[0].name], tmp_path / "out")
        assert all("without a threshold" in line for line in lines)
        assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.exhaustive), {"category": "gear"}])
def test_thresholds_beside_an_export_of_raw_scores(settings, checkpoint, images, tmp_path):
    """The file beside an export makes the export's own decisions, and so does the example."""
    post_processor = CategoryPostProcessor(enable_normalization=False, category_output=True, **settings)
    model = DecAD.load_from_checkpoint(checkpoint, post_processor=post_processor)
    path = Engine(logger=False, accelerator="cpu").export(model, "onnx", export_root=tmp_path)
    content = json.loads(path.with_suffix(".thresholds.json").read_text())
    assert content["unit"] == "raw"
    assert [row["name"] for row in content["categories"]] == ([*settings.values()] or ["brick", "gear"])
    lines, run = run_example("onnx", path, images, tmp_path / "out"), onnx_session(path)
    for image, line in zip(images, lines, strict=True):
        outputs = run(array(read(image)))
        index = int(outputs["category"][0])
        assert not settings or index == 0
        row = content["categories"][index] if index >= 0 else content
        decided = bool(outputs["pred_label"][0])
        assert decided == (float(outputs["pred_score"][0]) > row["image"])
        assert ("anomalous" in line) == decided
        assert row.get("name", "unknown") in line


def start(script, *arguments):
    """Run a script as a user does."""
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def run_example(kind, path, images, output):
    """Run an example, and give the line of each image."""
    result = start(example(kind), path, *images, "--output", output)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def example(kind):
    return ROOT / "examples" / f"{kind}_inference.py"


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [(onnx_session, "onnx"), pytest.param(openvino_model, "openvino", marks=pytest.mark.exhaustive)],
)
def test_the_product_is_an_output_on_request(runtime, kind, checkpoint, images, expected, tmp_path):
    """Decisions are those of the recognized products, whose thresholds differ."""
    model = DecAD.load_from_checkpoint(checkpoint, post_processor=CategoryPostProcessor(category_output=True))
    assert model.post_processor.categories == ["brick", "gear"]
    thresholds = [model.post_processor.limits(name).image_threshold for name in ("brick", "gear")]
    assert abs(thresholds[0] - thresholds[1]) > 1e-3
    path = Engine(logger=False, accelerator="cpu").export(model, kind, export_root=tmp_path)
    run, indices = runtime(path), []
    for image, item in zip(images, expected, strict=True):
        outputs = run(array(read(image)))
        indices.append(int(outputs["category"][0]))
        assert_agrees(outputs, item)
    assert {indices[0], indices[-1]} <= {0, 1, -1}
    assert set(indices) - {-1}
    content = json.loads(path.with_suffix(".thresholds.json").read_text())
    assert [row["name"] for row in content["categories"]] == ["brick", "gear"]


def test_an_export_for_one_product(checkpoint, images, tmp_path):
    model = DecAD.load_from_checkpoint(checkpoint, post_processor=CategoryPostProcessor(category="gear"))
    path = Engine(logger=False, accelerator="cpu").export(model, "onnx", export_root=tmp_path)
    limits = model.post_processor.limits("gear")
    run = onnx_session(path)
    raw = DecAD.load_from_checkpoint(checkpoint, post_processor=False)
    for image, item in zip(images, predict(raw, images), strict=True):
        score = (float(item.pred_score) - limits.image_threshold) / (limits.image_max - limits.image_min) + 0.5
        assert float(run(array(read(image)))["pred_score"][0]) == pytest.approx(np.clip(score, 0, 1), abs=1e-4)
    with pytest.raises(ValueError, match="no category 'screw': there are brick, gear"):
        DecAD.load_from_checkpoint(checkpoint, post_processor=CategoryPostProcessor(category="screw")).to_onnx(tmp_path)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_examples_refuse_thresholds_that_they_cannot_apply(kind, export, images, tmp_path):
    path = export(kind)
    for file in path.parent.glob("model.*"):
        shutil.copy(file, tmp_path)
    content = json.loads((tmp_path / "model.thresholds.json").read_text())
    content["categories"][0]["image"] = 0.9
    (tmp_path / "model.thresholds.json").write_text(json.dumps(content))
    arguments = example(kind), tmp_path / path.name, images[0], "--output", tmp_path / "out"
    result = start(*arguments)
    assert result.returncode == 1
    assert "or give --category" in result.stderr
    assert ": brick, score" in start(*arguments, "--category", "brick").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression_type": "int8_ptq"}, "needs images to calibrate with"),
        ({"compression_type": "int3"}, "is not a valid CompressionType"),
        ({"compression_type": "int8_acq", "datamodule": 1}, "int8_acq is not offered: int8_ptq keeps"),
    ],
)
def test_wrong_compressions_are_refused_at_once(options, message, make_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_model().to_openvino(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_exporting_leaves_the_model_as_it_was(checkpoint, tmp_path):
    model = DecAD.load_from_checkpoint(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = model.to_torch(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.train().model(torch.rand(4, 3, *SIZE)).x.requires_grad is False
    exported = torch.load(path, weights_only=False)["model"]
    assert not any(parametrize.is_parametrized(module) for module in exported.modules())
    assert not any(parameter.requires_grad for parameter in exported.parameters())
    pickle.dumps(exported)


def test_another_models_resampling_of_positions_changes_nothing(checkpoint, expected, images, monkeypatch):
    import functools

    import timm.models.vision_transformer as vit

    without = functools.partial(vit.resample_abs_pos_embed, antialias=False)
    monkeypatch.setattr(vit, "resample_abs_pos_embed", without)
    model = DecAD.load_from_checkpoint(checkpoint).eval()
    batch = torch.from_numpy(array(read(images[1])))
    with torch.no_grad():
        for variant in (model, model._for_export(native=True)):
            assert_agrees(variant(batch)._asdict(), expected[1])
    assert vit.resample_abs_pos_embed is without


def test_what_cannot_be_exported_is_refused_before_a_file_is_made(make_model, encoder_weights, tmp_path):
    model = DecAD(encoder=ENCODER, encoder_weights=encoder_weights, layers=[1], pre_processor=False)
    with pytest.raises(ValueError, match="--input_size"):
        model.to_onnx(tmp_path)
    with pytest.raises(ValueError, match="48 x 64 would do"):
        model.to_onnx(tmp_path, input_size=(50, 60))
    model = make_model().eval()
    model.post_processor.category = "foo"
    with pytest.raises(ValueError, match="foo"):
        model.to_torch(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_examples_find_a_product_by_its_index(kind, tmp_path):
    script = runpy.run_path(str(example(kind)))
    rows = [{"index": i, "name": f"p{i}", "image": 0.1 * i, "pixel": 0.5} for i in range(3)]
    path = tmp_path / "model.thresholds.json"
    path.write_text(json.dumps({"image": 0.5, "pixel": 0.5, "categories": rows[:0:-1]}), encoding="utf-8-sig")
    thresholds = script["read_thresholds"](tmp_path / "model.xml")
    assert script["choose"](thresholds, 1, None) == ("p1", 0.1, 0.5)
    assert script["choose"](thresholds, -1, None) == ("unknown", 0.5, 0.5)
    with pytest.raises(SystemExit, match="no thresholds of the product with index 0"):
        script["choose"](thresholds, 0, None)
    for value in ("NaN", "-1", "null", '"x"', 400 * "9"):
        path.write_text(f'{{"image": {value}, "pixel": 0.5, "categories": []}}')
        with pytest.raises(SystemExit, match="has no thresholds of an export"):
            script["read_thresholds"](tmp_path / "model.xml")


@pytest.mark.parametrize("size", [(20, 30), (40, 50), (33, 17), (500, 7)])
def test_matrix_resize_is_torchvisions(size):
    images = torch.rand(2, 3, 40, 50)
    expected = Resize(size, antialias=True)(images)
    torch.testing.assert_close(MatrixResize(size)(images), expected, rtol=0, atol=1e-4)


def test_other_resizing_is_exported_with_a_warning(caplog):
    pre_processor = PreProcessor(Compose([Resize(32, antialias=True), Normalize([0.5] * 3, [0.5] * 3)]))
    images = torch.rand(1, 3, 64, 48)
    exported = for_export(pre_processor)
    assert "without antialiasing" in caplog.text
    torch.testing.assert_close(exported(images), pre_processor(images))
    torch.testing.assert_close(for_export(pre_processor, native=True)(images), pre_processor.transform(images))
    assert pre_processor.export_transform.transforms[0].antialias is False


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_examples_run_without_anomalib_and_skip_what_cannot_be_read(kind, export, images, expected, tmp_path):
    (tmp_path / "run.py").write_text(
        "import runpy, sys\n"
        "sys.modules.update(anomalib=None, torch=None, anomalib_decad=None)\n"
        f"runpy.run_path({str(example(kind))!r}, run_name='__main__')\n"
    )
    broken = [str(tmp_path / name) for name in ("part.png", "part.jpg", "none.png")]
    for name in broken[:2]:
        cv2.imwrite(name, cv2.imread(str(images[0])))
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) // 2])
    last = f"Skipped 3 files that are no images, or incomplete: {', '.join(broken)}"
    result = start(tmp_path / "run.py", export(kind), *images, *broken, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().splitlines()[-1] == last
    for line, image, item in zip(result.stdout.splitlines(), images, expected, strict=True):
        name, _, rest = line.partition(": score ")  # nobody says which product it is
        assert name == str(image)
        assert float(rest.split(",")[0]) == pytest.approx(float(item.pred_score), abs=2e-4)
        assert ("anomalous" in rest) == bool(item.pred_label)
        assert cv2.imread(str(tmp_path / "out" / image.name)).shape == cv2.imread(str(image)).shape
    result = start(example(kind), export(kind), *broken, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == last


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["inference", "exported_accuracy"])
def test_benchmarks_of_exports(script, checkpoint, data, tmp_path):
    if script == "inference":
        arguments = ["--models", "DecAD", "--seconds", 0.2, "--rounds", 1, "--checkpoint", checkpoint]
        arguments += ["--image-size", 64, "--folder", tmp_path]
    else:
        arguments = [checkpoint, "--data", data, "--categories", "brick", "gear", "--every", 6]
    result = start(BENCHMARKS / f"{script}.py", *arguments, "--formats", "torch")
    assert result.returncode == 0, result.stderr[-3000:]
    assert ("| encoder |" if script == "inference" else "| torch |") in result.stdout
    assert "failed" not in result.stdout
