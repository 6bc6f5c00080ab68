"""Images of more than 8 bits, masks that are not two-valued, and what a look at the data says."""

import warnings

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image as read_of_anomalib
from anomalib.data.utils import read_mask as read_mask_of_anomalib
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_decad import MultiCategory
from anomalib_decad.data import reading
from anomalib_decad.data.reading import (
    image_size,
    is_high_bit_depth,
    is_misread_by_anomalib,
    read_image,
    read_mask,
    white_level,
)
from conftest import make_dataset

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
    assert is_high_bit_depth(path)
    assert white_level([path]) == white
    image = read_image(path, white)
    expected = values.reshape(4, -1, 3)[..., :channels].astype(np.float32)[..., ::-1] / white
    assert torch.allclose(image, torch.from_numpy(expected.copy()).permute(2, 0, 1).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_images_are_read_as_anomalib_does(mode, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(values).convert(mode).save(path)
    assert not is_high_bit_depth(path)
    assert torch.equal(read_image(path), read_of_anomalib(path, as_tensor=True))


def test_white_is_that_of_the_product_and_not_of_the_image(tmp_path):
    dark = write(tmp_path / "dark.png", np.full((4, 4), 900, np.uint16))
    bright = write(tmp_path / "bright.png", np.full((4, 4), 4000, np.uint16))
    assert white_level([dark, bright]) == 4095
    assert white_level([dark]) == 1023


@pytest.mark.parametrize(("largest", "white"), [(0.7, 1), (70000.0, 70000)])
def test_values_that_are_no_whole_numbers_of_16_bits(largest, white, tmp_path):
    path = write(tmp_path / "float.tif", np.linspace(0, largest, 16, dtype=np.float32).reshape(4, 4))
    assert white_level([path]) == pytest.approx(white)
    assert read_image(path, white).max() == pytest.approx(largest / white)


def test_values_above_white_and_below_0_are_clipped_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reading, "_warned", set())  # each white level is said once
    path = write(tmp_path / "bright.png", np.full((4, 4), 4000, np.uint16))
    assert read_image(path, 1022).max() == 1
    assert "bright.png has values above 1022" in caplog.text
    path = write(tmp_path / "height.tif", np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4))
    assert white_level([path]) == 1
    assert read_image(path, 1.0).min() == 0
    assert "height.tif has values above 1, which is white in other images of the product, or below 0" in caplog.text


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_do_not_make_white(odd, tmp_path):
    values = np.linspace(0, 0.5, 16, dtype=np.float32).reshape(4, 4)
    values[0, 0] = odd
    paths = [write(tmp_path / name, values) for name in ("first.tif", "second.tif")]
    assert white_level(paths) == 1
    image = read_image(paths[0], 1.0)
    assert image[0, 0, 0] == (1.0 if odd == np.inf else 0.0)
    torch.testing.assert_close(image[:, 1:].as_subclass(torch.Tensor), torch.from_numpy(values[1:]).expand(3, -1, -1))
    write(paths[1], np.full((4, 4), odd, np.float32))
    with pytest.raises(OSError, match=r"second\.tif cannot be read"):
        white_level(paths)


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
    assert datamodule.white_levels == {"bolts": WHITES[bits]}
    assert f"category bolts: images of more than 8 bits, in which {WHITES[bits]} is white" in caplog.text
    assert "category cloth" not in caplog.text
    for item in map(datamodule.test_data.__getitem__, range(12)):
        assert torch.allclose(item.image, expected[item.image_path], atol=2 / WHITES[bits])
        assert item.image.mean() < 0.6


def test_predictions_of_a_folder_of_deep_images(make_model, make_engine, tmp_path, caplog):
    """A folder of 16-bit images is scored as the same images of 8 bits, with the white level of the training."""
    make_dataset(tmp_path / "data", ("bolts",))
    deepen(tmp_path / "data", 12)
    model, engine = make_model(), make_engine()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You have overridden")  # Lightning's, of hooks that move a batch
        engine.fit(model, datamodule=MultiCategory("MVTecAD", root=tmp_path / "data", **OPTIONS))
    for index in range(5):  # darker than 10 bits, which only the training tells
        values = np.random.default_rng(index).integers(0, 800, (60, 70)).astype(np.uint16)
        write(tmp_path / "16" / f"{index}.png", values)
        write(tmp_path / "8" / f"{index}.png", (values / 4095 * 255).round().astype(np.uint8))
    path = engine.trainer.checkpoint_callback.best_model_path
    scores = []
    for name in ("8", "16"):
        batches = make_engine().predict(make_model(), dataset=PredictDataset(tmp_path / name), ckpt_path=path)
        scores.append(torch.cat([batch.pred_score.flatten() for batch in batches]))
    assert torch.allclose(*scores, atol=0.02)
    assert "4095 is white, as in the training" in caplog.text


def turn(path, orientation, target=None):
    """Save an image so that a viewer, which turns it by its tag, shows it as it was."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions
    with Image.open(path) as image:
        exif = image.getexif()
        exif[274] = orientation
        turned = image.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else image
        turned.save(target or path, exif=exif)
    return target or path


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("L", "png"), ("L", "jpg"), ("RGB", "png"), ("RGB", "tif"), ("RGB", "jpg"), ("I;16", "png"), ("I;16", "tif")],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_by_their_orientation(kind, suffix, orientation, tmp_path):
    values = np.random.default_rng(0).integers(0, 65535, (16, 24), np.uint16)
    values[8:] = values[::8][0]
    is_deep = kind == "I;16"
    image = Image.fromarray(values) if is_deep else Image.fromarray((values >> 8).astype(np.uint8)).convert(kind)
    image.save(tmp_path / "plain.png")
    turn(tmp_path / "plain.png", orientation, tmp_path / "turned.png")
    path = tmp_path / f"image.{suffix}"
    with Image.open(tmp_path / "turned.png") as turned:
        turned.save(path, exif=turned.getexif(), **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    assert_is(path, values, 0.02 if suffix == "jpg" else 0.005)
    assert is_misread_by_anomalib(path) == (orientation > 1 or is_deep)


def test_color_images_of_16_bits_are_turned(tmp_path):
    values = np.random.default_rng(0).integers(0, 65535, (16, 24), np.uint16)
    stored = [values, values[:, ::-1], values[::-1, ::-1], values[::-1], values.T, np.rot90(values),
              np.rot90(values, 2).T, np.rot90(values, -1)]  # fmt: skip
    for orientation, undone in enumerate(stored, 1):
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(tmp_path / "image.tif", np.dstack([undone] * 3), photometric="rgb", extratags=[tag])
        assert_is(tmp_path / "image.tif", values, 0.005)


def assert_is(path, values, tolerance):
    image = read_image(path)
    assert image_size(path) == (24, 16)
    expected = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, -1, -1)
    torch.testing.assert_close(image.as_subclass(torch.Tensor), expected, rtol=0, atol=tolerance)


def test_a_folder_with_an_orientation_is_predicted_as_upright_images(make_model, make_engine, tmp_path):
    make_dataset(tmp_path / "data", ("bolts",))
    datamodule = MultiCategory("MVTecAD", root=tmp_path / "data", **OPTIONS)
    model, engine = make_model(visualizer=True), make_engine()
    engine.fit(model, datamodule=datamodule)
    scores, pictures = [], []
    for name, orientation in (("upright", 1), ("turned", 6)):
        (tmp_path / name).mkdir()
        for path in tmp_path.glob("data/bolts/test/square/*.png"):
            turn(path, orientation, tmp_path / name / path.name)
        engine = make_engine()
        batches = engine.predict(model, dataset=PredictDataset(tmp_path / name))
        scores.append(torch.cat([batch.pred_score.flatten() for batch in batches]))
        pictures.append([cv2.imread(str(path)) for path in sorted(tmp_path.rglob(f"images/**/{name}/*.png"))])
    assert torch.allclose(*scores, atol=1e-4)
    assert len(pictures[0]) == 3
    for upright, turned in zip(*pictures, strict=True):
        assert np.abs(upright.astype(int) - turned).mean() < 1


def test_masks_of_two_values_are_read_as_anomalib_does(tmp_path):
    for largest in (1, 128, 255):
        values = np.random.default_rng(0).integers(0, 2, (8, 9)) * largest
        path = write(tmp_path / "mask.png", values.astype(np.uint8))
        assert torch.equal(read_mask(path), read_mask_of_anomalib(path, as_tensor=True))
    path = write(tmp_path / "mask.png", np.array([[0, 1], [2, 3]], np.uint8))
    assert read_mask(path).tolist() == [[0, 1], [1, 1]]


def colored(found, color, alpha=None):
    """An image of one color where there is a defect, black elsewhere."""
    colors = np.where(found[..., None], color, 0)
    return Image.fromarray((colors if alpha is None else np.dstack([colors, alpha * 255])).astype(np.uint8))


def with_palette(found, *palette):
    image = Image.fromarray(found.astype(np.uint8), "P")
    image.putpalette(palette)
    return image


#: How masks are saved.
MASKS = {
    "dark red": lambda found: colored(found, (1, 0, 0)),
    "dark blue": lambda found: colored(found, (0, 0, 4)),
    "opaque": lambda found: colored(found, (0, 0, 4), found * 0 + 1),
    "palette": lambda found: colored(found, (0, 0, 4)).convert("P", palette=Image.Palette.ADAPTIVE),
    "16 bits": lambda found: Image.fromarray(found.astype(np.uint16)),
    "alpha": lambda found: colored(found | True, (255, 255, 255), found),
    "alpha of grey": lambda found: colored(found, (0, 0, 0), found).convert("LA"),
    "layer": lambda found: colored(found, (255, 0, 0), found),
    "white palette": lambda found: with_palette(found, 255, 255, 255, 255, 0, 0),
    "palette of grey": lambda found: with_palette(found, 90, 90, 90, 9, 9, 9),
    "swapped palette": lambda found: with_palette(~found, 255, 255, 255, 0, 0, 0),
}


@pytest.mark.parametrize("draw", MASKS.values(), ids=MASKS)
def test_kinds_of_masks(draw, tmp_path):
    found = np.zeros((8, 9), bool)
    found[2:5, 3:8] = True
    path = tmp_path / "mask.png"
    draw(found).save(path)
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


def test_a_look_at_the_data_says_what_is_odd(tmp_path, caplog):
    make_dataset(tmp_path, ("bolts", "cloth"))
    MultiCategory("MVTecAD", root=tmp_path, **OPTIONS).setup()
    assert "The category" not in caplog.text
    write(tmp_path / "bolts/ground_truth/square/000_mask.png", np.zeros((80, 96), np.uint8))
    write(tmp_path / "bolts/ground_truth/square/001_mask.png", np.full((40, 96), 200, np.uint8))
    write(tmp_path / "bolts/test/good/000.png", np.full((80, 96), np.arange(96), np.uint16))
    MultiCategory("MVTecAD", root=tmp_path, **OPTIONS).setup()
    (line,) = [text for text in caplog.messages if "The category" in text]
    for finding in (
        "The category bolts: images of more than 8 bits, in which 255 is white",
        "the mask 000_mask.png of an anomalous image is empty",
        "the mask 001_mask.png is of another size than its image",
    ):
        assert finding in line


def test_a_file_that_is_no_image_is_named(tmp_path):
    make_dataset(tmp_path, ("bolts",))
    (tmp_path / "bolts" / "train" / "good" / "000.png").write_text("no image")
    with pytest.raises(
        RuntimeError, match=r"the category 'bolts' cannot be read: .*000\.png.*remove or replace the file"
    ):
        MultiCategory("MVTecAD", root=tmp_path, **OPTIONS).setup()


@pytest.mark.parametrize("subset", ["train", "test"])
def test_an_incomplete_file_is_named(subset, make_engine, make_model, tmp_path):
    make_dataset(tmp_path / "shop", ("bolts",))
    path = tmp_path / "shop" / "bolts" / subset / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:3000])
    data = MultiCategory("MVTecAD", root=tmp_path / "shop", num_workers=0)
    with pytest.raises((OSError, RuntimeError), match=rf"{path} cannot be read \(.*\): remove or replace the file"):
        make_engine().train(make_model(), datamodule=data)


@pytest.mark.parametrize(
    ("draw", "finding"),
    [
        (MASKS["layer"], "has an alpha channel, which may be what counts"),
        (MASKS["white palette"], "has a palette whose first color is not black"),
        (lambda found: Image.fromarray((found * 0 + 255).astype(np.uint8)), "covers 100% of the image"),
        (MASKS["dark red"], None),
    ],
)
def test_odd_masks_are_findings_of_the_look_at_the_data(draw, finding, tmp_path, caplog):
    make_dataset(tmp_path, ("bolts",), num_test=1)
    path = tmp_path / "bolts" / "ground_truth" / "square" / "000_mask.png"
    draw(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0).save(path)
    MultiCategory("MVTecAD", root=tmp_path, **OPTIONS).setup()
    assert f"the mask 000_mask.png {finding}" in caplog.text if finding else "000_mask.png" not in caplog.text
