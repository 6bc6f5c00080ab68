"""The page: what it says, that nothing in it comes from a name, and that it is bounded."""

import base64
import html
import re
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib as mpl
import pytest
import torch
from anomalib.data.utils import ValSplitMode
from anomalib.post_processing import PostProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_examples import NASTY, make_batch, make_post_processor, run_test, two_products

from anomalib_decad.callbacks import Report
from anomalib_decad.thresholds import CategoryPostProcessor

names = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


def text_of(path):
    """The texts of a page."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", path.read_text("utf-8"), flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", "", page).split()))


def test_it_says_what_was_found(tmp_path, capsys):
    path = two_products(tmp_path)
    assert capsys.readouterr().out.endswith(f"Report: {path}\n")
    text = text_of(path)
    for part in ("on factory", "6 images, missed defects: 1 of 3, false alarms: 1 of 3", "Missed defect", "False alarm",
                 "6 of 6 shown", "Pixel AUPRO", "mAD", "loss.weight", "Mask F1", "75.0"):  # fmt: skip
        assert part in text
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_it_loads_nothing_and_all_that_is_referred_to_is_there(tmp_path):
    path = two_products(tmp_path)
    page = path.read_text()
    addresses = re.findall(r' (?:src|href|action|data)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://|url\((?!#)|@import", page)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]*)', page)) <= set(ids)
    assert all("aria-label" in svg for svg in re.findall(r"<svg[^>]*role=\"img\"[^>]*>", page))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(product=names, folder=names, file=names)
def test_names_stay_names(tmp_path, product, folder, file):
    def run(*names):
        product, folder, file = (name.replace("/", "_") for name in names)
        batch = make_batch([0.1, 0.9], [False, True], product, [f"/data/{folder}/{file}.png"] * 2)
        path = run_test(tmp_path, [batch], post_processor=make_post_processor(), evaluator=False)
        assert " ".join(product.split()) in text_of(path)
        return re.findall(r"<[a-z!/][^\s>]*|(?<= )[a-z-]+(?==\")", path.read_text("utf-8"))

    # No tag and no attribute depends on what the names are.
    assert run(product, folder, file) == run("product", "folder", "file")


@pytest.mark.parametrize(
    ("part", "scores", "labels", "options"),
    [
        ("have no labels", [0.1, 0.9], None, {}),
        ("only normal images", [0.1, 0.9], [False, False], {}),
        ("only defects", [0.1, 0.9], [True, True], {"size": (40, 9)}),
        ("1 defects have no mask", [0.1, 0.9], [False, True], {"masks": False}),
        ("2 images", [0.1, 0.9], [False, True], {"maps": False}),
        ("2 images", [0.5, 0.5], [False, True], {}),
        ("1 images have no finite score", [0.1, float("nan"), 0.9], [False, False, True], {}),
    ],
)
def test_what_is_missing_is_said(part, scores, labels, options, tmp_path):
    assert part in text_of(run_test(tmp_path, [make_batch(scores, labels, **options)], None, make_post_processor()))
    text = text_of(run_test(tmp_path, [make_batch(scores, labels, **options)], evaluator=False))
    assert "There is no threshold" in text
    assert "Missed defect " not in text
    assert "False alarm " not in text
    assert "evaluator=CategoryEvaluator()" in text


@pytest.mark.parametrize(("kind", "threshold"), [(CategoryPostProcessor, "5.000"), (PostProcessor, "0.5000")])
def test_scores_and_thresholds_have_one_unit(kind, threshold, tmp_path):
    """With anomalib's own post-processor they are normalized."""
    is_raw = kind is CategoryPostProcessor
    batch = make_batch([1.0, 9.0], [False, True])
    text = text_of(run_test(tmp_path, [batch], post_processor=make_post_processor(5.0, 0.0, 10.0, kind)))
    assert f"threshold {threshold}" in text
    assert "missed defects: 0 of 1" in text
    assert ("normalized by anomalib" in text) != is_raw


@pytest.mark.parametrize("mode", [ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TRAIN])
def test_it_says_when_thresholds_were_chosen_on_the_test_images(mode, tmp_path):
    one = SimpleNamespace(name="factory", val_split_mode=mode)
    for data in (one, SimpleNamespace(name="factory", datamodules={"bolts": one})):
        text = text_of(two_products(tmp_path, datamodule=data))
        assert ("chosen on these test images" in text) == (mode == ValSplitMode.SAME_AS_TEST)


@pytest.mark.parametrize(("products", "shown"), [(1, 20), (4, 3)])
def test_ten_thousand_images_are_bounded(products, shown, tmp_path, monkeypatch):
    """Products share the room, and no style of matplotlib's changes."""
    style, count = dict(mpl.rcParams), 10_000 // products
    if products > 1:
        monkeypatch.setattr("anomalib_decad.callbacks.report.page._MAX_IMAGES", 12)
    labels = (torch.rand(100) < 0.2).tolist()
    batches = (make_batch(torch.rand(100).tolist(), labels, f"p{i % products}") for i in range(100))
    path = run_test(tmp_path, batches, Report(max_images=20, image_size=32), make_post_processor(), evaluator=False)
    assert path.stat().st_size < 300_000
    assert text_of(path).count(f"{shown} of {count:,} shown") == products
    assert path.read_text().count("<article") == shown * products
    assert dict(mpl.rcParams) == style


@pytest.mark.parametrize(
    ("labels", "parts"),
    [([False, True], ["threshold 0.5", "AUC = 1.00", "AP = 1.00"]), ([False, False], []), (None, ["unlabelled"])],
)
def test_charts_show_what_there_is(labels, parts, tmp_path):
    path = run_test(tmp_path, [make_batch([0.1, 0.9], labels)], post_processor=make_post_processor())
    (content,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)', path.read_text())
    chart = base64.b64decode(content).decode()
    assert all(part in chart for part in parts)
    assert ("AUC" in chart) == (parts[1:] != [])


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("something else")])
def test_an_error_is_a_warning_and_leaves_what_was_there(error, tmp_path, monkeypatch, capsys, caplog):
    path = two_products(tmp_path)
    before = path.read_text()
    capsys.readouterr()
    monkeypatch.setattr("pathlib.Path.write_text", Mock(side_effect=error))
    two_products(tmp_path, evaluator=False)
    assert path.read_text() == before
    assert "Report:" not in capsys.readouterr().out
    assert str(error) in caplog.text


def test_without_scores_there_is_no_chart_or_no_report(tmp_path, caplog):
    page = run_test(tmp_path, [make_batch([float("nan")], paths=[""])], evaluator=False).read_text()
    assert "1 images have no finite score" in page
    assert "data:image/svg+xml" not in page
    batch = make_batch([0.5], maps=False)
    batch.pred_score = batch.raw_score = None
    run_test(tmp_path, [batch], evaluator=False)
    assert "no images with scores: there is no report" in caplog.text
