"""Images of more than 8 bits, masks that are not two-valued, and what a look at the data says."""

import importlib.util
import warnings

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD, PredictDataset
from anomalib.data.utils import read_image as read_of_anomalib
from anomalib.data.utils import read_mask as read_mask_of_anomalib
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_decad import MultiCategory
from anomalib_decad.data import reading
from anomalib_decad.data.reading import find_white, is_deep, read_image, read_mask
from conftest import ROOT, make_dataset

WHITES = {8: 255, 10: 1023, 12: 4095, 16: 65535}
OPTIONS = {"num_workers": 0, "train_batch_size": 4, "eval_batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values)
    return path


def deepen(root, bits, product="bolts"):
    """Write the images of a product with 16 bits, of which so many are used."""
    for path in root.glob(f"{product}/t*/*/*.png"):
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        write(path, (image.astype(np.float64) * WHITES[bits] / 255).astype(np.uint16))


@given(data=st.data(), bits=st.sampled_from(list(WHITES)), suffix=st.sampled_from(["png", "tif"]),
       channels=st.sampled_from([1, 3]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_deep_images_keep_their_values(data, bits, suffix, channels, folder):
    white = WHITES[bits]
    values = np.array(data.draw(st.lists(st.integers(0, white), min_size=12, max_size=12)), np.uint16)
    values[0] = white
    path = write(folder / f"deep.{suffix}", values.reshape(4, -1, 3)[..., :channels].copy())
    assert is_deep(path)
    assert find_white([path])[0] == white
    image = read_image(path, white)
    expected = values.reshape(4, -1, 3)[..., :channels].astype(np.float32)[..., ::-1] / white
    assert torch.allclose(image, torch.from_numpy(expected.copy()).permute(2, 0, 1).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_images_are_read_as_anomalib_does(mode, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(values).convert(mode).save(path)
    assert not is_deep(path)
    assert torch.equal(read_image(path), read_of_anomalib(path, as_tensor=True))


def test_white_is_that_of_the_product_and_not_of_the_image(tmp_path):
    dark = write(tmp_path / "dark.png", np.full((4, 4), 900, np.uint16))
    bright = write(tmp_path / "bright.png", np.full((4, 4), 4000, np.uint16))
    assert find_white([dark, bright]) == (4095, "12 bits")
    assert find_white([dark]) == (1023, "10 bits")


@pytest.mark.parametrize(("largest", "white", "kind"), [(0.7, 1, "fractions"), (70000.0, 70000, "an unknown kind")])
def test_values_that_are_no_whole_numbers_of_16_bits(largest, white, kind, tmp_path):
    path = write(tmp_path / "float.tif", np.linspace(0, largest, 16, dtype=np.float32).reshape(4, 4))
    assert find_white([path]) == (pytest.approx(white), kind)
    assert read_image(path, white).max() == pytest.approx(largest / white)


def test_values_above_white_are_clipped_and_said(tmp_path, caplog):
    path = write(tmp_path / "bright.png", np.full((4, 4), 4000, np.uint16))
    assert read_image(path, 1022).max() == 1
    assert "bright.png has values above 1022" in caplog.text


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_do_not_make_white(odd, tmp_path):
    values = np.linspace(0, 0.5, 16, dtype=np.float32).reshape(4, 4)
    values[0, 0] = odd
    paths = [write(tmp_path / name, values) for name in ("first.tif", "second.tif")]
    assert find_white(paths) == (1.0, "fractions")
    image = read_image(paths[0], 1.0)
    assert image[0, 0, 0] == (1.0 if odd == np.inf else 0.0)
    torch.testing.assert_close(image[:, 1:].as_subclass(torch.Tensor), torch.from_numpy(values[1:]).expand(3, -1, -1))
    write(paths[1], np.full((4, 4), odd, np.float32))
    for read in (find_white, lambda paths: [read_image(path) for path in paths]):
        with pytest.raises(OSError, match=r"second\.tif cannot be read \(it has no finite value\)"):
            read(paths)


def test_negative_values_are_black_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reading, "_clipped", set())  # each is said once
    path = write(tmp_path / "height.tif", np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4))
    assert read_image(path, 1.0).min() == 0
    assert "height.tif has negative values: they are clipped" in caplog.text
    write(path, np.full((4, 4), -9, np.float32))
    with pytest.raises(OSError, match=r"all values of .*height\.tif are negative, and 0 is black"):
        find_white([path])


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_products_of_any_depth_look_as_those_of_8_bits(bits, tmp_path, caplog):
    make_dataset(tmp_path, ("bolts", "cloth"))
    deepen(tmp_path, 8)
    plain = MultiCategory("MVTecAD", root=tmp_path, bit_depth=8, **OPTIONS)
    plain.setup()
    expected = {item.image_path: item.image for item in map(plain.test_data.__getitem__, range(12))}
    make_dataset(tmp_path, ("bolts", "cloth"))
    deepen(tmp_path, bits)
    caplog.clear()
    datamodule = MultiCategory("MVTecAD", root=tmp_path, **OPTIONS)
    datamodule.setup()
    assert datamodule.whites == {"bolts": WHITES[bits]}
    assert f"category bolts: images of more than 8 bits, in which {WHITES[bits]} is white" in caplog.text
    assert "category cloth" not in caplog.text
    for item in map(datamodule.test_data.__getitem__, range(12)):
        assert torch.allclose(item.image, expected[item.image_path], atol=2 / WHITES[bits])
        assert item.image.mean() < 0.6


def test_a_bit_depth_that_is_given_counts(tmp_path):
    make_dataset(tmp_path, ("bolts",))
    deepen(tmp_path, 10)
    datamodule = MultiCategory("MVTecAD", root=tmp_path, bit_depth=12, **OPTIONS)
    datamodule.setup()
    assert datamodule.train_data[0].image.max() < 0.26
    with pytest.raises(ValueError, match="bit_depth must be"):
        MultiCategory("MVTecAD", root=tmp_path, bit_depth=4)


@pytest.mark.parametrize("trained", [8, 12])
def test_predictions_of_a_folder_of_deep_images(trained, make_model, make_engine, tmp_path, caplog):
    """A folder of 16-bit images is scored as the same images of 8 bits."""
    make_dataset(tmp_path / "data", ("bolts",))
    if trained == 12:
        deepen(tmp_path / "data", 12)
    datamodule = MultiCategory("MVTecAD", root=tmp_path / "data", **OPTIONS)
    model, engine = make_model(), make_engine()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You have overridden")  # Lightning's, of hooks that move a batch
        engine.fit(model, datamodule=datamodule)
    for number, white in ((8, 255), (16, 4095)):
        for index in range(5):  # darker than 10 bits, which only the training tells
            values = np.random.default_rng(index).integers(0, white // 5, (60, 70)).astype(np.uint16)
            if index == 4 and trained == 8:
                values[0] = white
            write(tmp_path / str(number) / f"{index}.png", values.astype(np.uint8) if number == 8 else values)
            if number == 16:
                write(tmp_path / "8" / f"{index}.png", (values / 4095 * 255).round().astype(np.uint8))
    path = engine.trainer.checkpoint_callback.best_model_path
    results = {}
    for name in ("8", "16"):
        caplog.clear()
        batches = make_engine().predict(make_model(), dataset=PredictDataset(tmp_path / name), ckpt_path=path)
        results[name] = torch.cat([batch.pred_score.flatten() for batch in batches])
    assert torch.allclose(results["8"], results["16"], atol=0.02)
    assert "4095 is white, as " + ("in the training" if trained == 12 else "their values fit 12 bits") in caplog.text


def test_white_images_of_other_datamodules_are_said(make_model, make_engine, tmp_path, caplog):
    make_dataset(tmp_path, ("bolts",))
    deepen(tmp_path, 12)
    engine = make_engine(max_steps=2)
    engine.train(make_model(), datamodule=MVTecAD(tmp_path, "bolts", train_batch_size=4, num_workers=0))
    assert caplog.text.count("Use MultiCategory, which scales them") == 2  # in training and in test


def test_masks_of_two_values_are_read_as_anomalib_does(tmp_path):
    for largest in (1, 128, 255):
        values = np.random.default_rng(0).integers(0, 2, (8, 9)) * largest
        path = write(tmp_path / "mask.png", values.astype(np.uint8))
        assert torch.equal(read_mask(path), read_mask_of_anomalib(path, as_tensor=True))
    path = write(tmp_path / "mask.png", np.array([[0, 1], [2, 3]], np.uint8))
    assert read_mask(path).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    "kind", ["dark red", "dark blue", "palette", "transparent", "grey and alpha", "float", "16 bits"]
)
def test_every_value_above_0_is_a_defect(kind, tmp_path):
    found = np.zeros((6, 7), bool)
    found[2:4, 3:5] = True
    colours = np.zeros((6, 7, 3), np.uint8)
    if kind == "dark red":
        colours[found] = (1, 0, 0)
    elif kind in {"dark blue", "palette", "transparent"}:
        colours[found] = (0, 0, 4)
    if kind == "palette":
        image = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE)
    elif kind == "transparent":
        image = Image.fromarray(np.dstack([colours, np.full((6, 7), 255, np.uint8)]))
    elif kind == "grey and alpha":
        image = Image.fromarray(np.dstack([found * 3, np.full((6, 7), 255)]).astype(np.uint8), "LA")
    elif kind == "float":
        image = Image.fromarray(found.astype(np.float32) / 2)
    elif kind == "16 bits":
        image = Image.fromarray(found.astype(np.uint16))
    else:
        image = Image.fromarray(colours)
    path = tmp_path / ("mask.tiff" if kind == "float" else "mask.png")
    image.save(path)
    assert np.array_equal(read_mask(path).numpy(), found)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_noise_in_masks_is_no_defect(suffix, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 13:50] = 255
    path = write(tmp_path / "mask.jpg", mask)
    if suffix == "png":
        path = write(tmp_path / "mask.png", cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    assert read_mask_of_anomalib(path, as_tensor=True).sum() > 1.05 * mask.sum() / 255
    assert (read_mask(path).numpy() != (mask > 0)).mean() < 0.02


def find_line(root, caplog, *arguments, **kwargs):
    caplog.clear()
    MultiCategory(*(arguments or ("MVTecAD",)), root=root, **OPTIONS, **kwargs).setup()
    lines = [record.getMessage() for record in caplog.records if "category bolts" in record.getMessage()]
    assert len(lines) <= 1
    return lines[0] if lines else ""


def test_a_look_at_the_data_says_what_is_odd(tmp_path, caplog):
    make_dataset(tmp_path, ("bolts", "cloth"))
    assert find_line(tmp_path, caplog) == ""
    write(tmp_path / "bolts/train/good/000.png", np.full((80, 96, 3), 255, np.uint8))
    write(tmp_path / "bolts/ground_truth/square/000_mask.png", np.zeros((80, 96), np.uint8))
    write(tmp_path / "bolts/ground_truth/square/001_mask.png", np.full((40, 96), [[0, 200] * 48], np.uint8))
    write(tmp_path / "bolts/ground_truth/square/002_mask.png", np.arange(80 * 96).reshape(80, 96).astype(np.uint8))
    write(tmp_path / "bolts/test/good/000.png", np.full((80, 96), np.arange(96), np.uint16))
    line = find_line(tmp_path, caplog)
    for finding in (
        "images of more than 8 bits, in which 255 is white",
        "images of 8 bits beside those of more",
        "the mask 000_mask.png of an anomalous image is empty",
        "the mask 001_mask.png is of another size than its image",
        "the mask 002_mask.png has 256 values, not two: save masks as PNG with 0 and 255",
    ):
        assert finding in line
    write(tmp_path / "bolts/test/good/000.png", np.full((80, 96), 7, np.uint8))
    for path in tmp_path.glob("bolts/train/good/*.png"):
        write(path, np.full((80, 96), 7, np.uint8))
    assert "has one value everywhere" in find_line(tmp_path, caplog)


def test_a_file_that_is_no_image_is_named(tmp_path):
    make_dataset(tmp_path, ("bolts",))
    (tmp_path / "bolts" / "train" / "good" / "000.png").write_text("no image")
    with pytest.raises(
        RuntimeError, match=r"the category 'bolts' cannot be read: .*000\.png.*remove or replace the file"
    ):
        MultiCategory("MVTecAD", root=tmp_path, **OPTIONS).setup()


@pytest.mark.parametrize("layout", ["MVTecAD", "Folder"])
def test_names_with_letters_outside_ascii(layout, tmp_path):
    root = tmp_path / "Prüfung"
    make_dataset(root, ("Schräubchen", "螺栓"))
    arguments = {"normal_dir": "train/good", "abnormal_dir": "test/square", "mask_dir": "ground_truth/square"}
    datamodule = MultiCategory(
        layout, root=root, datamodule_args=arguments if layout == "Folder" else None, seed=0, **OPTIONS
    )
    datamodule.setup()
    assert {name for batch in datamodule.test_dataloader() for name in batch.category} == {"Schräubchen", "螺栓"}


def test_a_path_that_anomalib_refuses_is_named_with_its_category(tmp_path):
    (tmp_path / "Prüfung" / "can" / "train" / "good").mkdir(parents=True)
    message = "the category 'can' cannot be read: .*: rename the folders so that their names have ASCII letters only"
    with pytest.raises(ValueError, match=message):
        MultiCategory("MVTecAD2", root=tmp_path / "Prüfung", **OPTIONS).setup()


@pytest.mark.parametrize("script", ["onnx_inference", "openvino_inference"])
@pytest.mark.parametrize("bits", [None, 12])
def test_examples_scale_deep_images(script, bits, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    batches = []

    def predict(batch):
        batches.append(batch)
        return {"pred_score": np.zeros((1, 1)), "pred_label": np.zeros((1, 1)), "anomaly_map": batch[:, :1],
                "pred_mask": np.zeros((1, 1, 8, 8))}  # fmt: skip

    monkeypatch.setattr(example, "load", lambda *_: predict)
    shades = np.linspace(0, 1, 64).reshape(8, 8)
    paths = [write(tmp_path / "a.png", (shades * 255).astype(np.uint8)),
             write(tmp_path / "b.png", (shades * 4095).astype(np.uint16)),
             write(tmp_path / "dark.png", (shades * 819).astype(np.uint16))]  # fmt: skip
    given = [*map(str, paths), "--output", str(tmp_path / "out"), *(["--bits", str(bits)] if bits else [])]
    monkeypatch.setattr("sys.argv", [script, "model", *given])
    example.main()
    for batch, scale in zip(batches, (1, 1, 0.2), strict=True):
        assert batch.dtype == np.float32
        assert np.allclose(batch, shades * scale, atol=1 / 255)
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("predict", [False, True])
def test_pictures_of_deep_images_show_them_as_the_model_sees_them(predict, make_model, make_engine, tmp_path):
    make_dataset(tmp_path / "data", ("bolts",))
    deepen(tmp_path / "data", 12)
    datamodule = MultiCategory("MVTecAD", root=tmp_path / "data", **OPTIONS)
    engine, model = make_engine(), make_model(visualizer=True)
    if predict:
        engine.predict(model, dataset=PredictDataset(tmp_path / "data" / "bolts" / "test" / "good"))
    else:
        engine.test(model, datamodule=datamodule)
    pictures = sorted(path for path in tmp_path.rglob("images/**/*.png") if path.parent.name == "good")
    assert len(pictures) == 3
    original = cv2.imread(str(tmp_path / "data/bolts/test/good/000.png"), cv2.IMREAD_UNCHANGED)
    picture = cv2.imread(str(pictures[0]))[40:, :200]  # below the title of the first field, the image
    assert picture.mean() == pytest.approx((original / 4095 * 255).mean(), abs=12)


@pytest.mark.parametrize("subset", ["train", "test"])
def test_an_incomplete_file_is_named(subset, make_engine, make_model, tmp_path):
    make_dataset(tmp_path / "shop", ("bolts",))
    path = tmp_path / "shop" / "bolts" / subset / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:3000])
    data = MultiCategory("MVTecAD", root=tmp_path / "shop", num_workers=0)
    with pytest.raises((OSError, RuntimeError), match=rf"{path} cannot be read \(.*\): remove or replace the file"):
        make_engine().train(make_model(), datamodule=data)
