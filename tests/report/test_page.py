"""The page: what it says, that nothing in it comes from a name, and that it is bounded."""

import importlib.resources
import re
import time
from html.parser import HTMLParser
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_examples import NASTY, make_batch, make_post_processor, run_test, two_products

from anomalib_decad.report import Report
from anomalib_decad.report.charts import loss_chart
from anomalib_decad.report.losses import LossCurves

names = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


class Page(HTMLParser):
    """Collects tags, attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.attributes, self.last = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.last = tag
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        if self.last not in ("style", "script"):
            self.texts.append(data)

    def rows(self):
        return " ".join(" ".join(self.texts).split())


def read(path):
    return Page(path.read_text("utf-8"))


def test_the_template_is_a_file_of_the_package():
    assert importlib.resources.files("anomalib_decad.report").joinpath("template.html").is_file()


def test_it_says_what_was_found(tmp_path, capsys):
    path = two_products(tmp_path)
    assert capsys.readouterr().out.endswith(f"Report: {path}\n")
    text = read(path).rows()
    for part in ("on factory", "6 images, 1 of 3 defects missed, 1 false alarms in 3 normal images", "Missed defect",
                 "False alarm", "6 of 6 shown", "Pixel AUPRO", "loss.weight", "anomalib-decad"):  # fmt: skip
        assert part in text
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))


def test_it_loads_nothing(tmp_path):
    page = read(two_products(tmp_path))
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "action", "data")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://", (tmp_path / "report.html").read_text())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(product=names, folder=names, file=names)
def test_names_stay_names(tmp_path, product, folder, file):
    def run(product, folder, file):
        paths = [f"/data/{folder.replace('/', '_')}/{file.replace('/', '_')}.png"] * 2
        batch = make_batch([0.1, 0.9], [False, True], product, paths)
        return read(run_test(tmp_path, [batch], post_processor=make_post_processor(), evaluator=False))

    plain, page = run("product", "folder", "file"), run(product, folder, file)
    # Nothing of the page depends on what the names are.
    assert [tag for tag in page.tags if tag != "wbr"] == [tag for tag in plain.tags if tag != "wbr"]
    assert [row[:2] for row in page.attributes] == [row[:2] for row in plain.attributes]
    values = [value for _, _, value in page.attributes]
    assert product in values
    assert any(file.replace("/", "_") in (value or "") for value in values)
    assert any(folder.replace("/", "_").strip() in text for text in page.texts)


@pytest.mark.parametrize(
    ("batch", "texts"),
    [
        (make_batch([0.1, 0.9]), ["have no labels", "without labels", "2 without labels"]),
        (make_batch([0.1, 0.9], [False, False]), ["only normal images", "1 false alarms in 2"]),
        (make_batch([0.1, 0.9], [True, True]), ["only defects", "1 of 2 defects missed"]),
        (make_batch([0.1, 0.9], [False, True], masks=False), ["1 defects have no mask"]),
        (make_batch([0.1, 0.9], [False, True], maps=False), ["AUROC 100.0 %"]),
        (make_batch([0.5, 0.5], [False, True]), ["AUROC 50.0 %"]),
        (make_batch([0.7], [True], size=(40, 9)), ["only defects"]),
    ],
    ids=["no labels", "only normal", "only defects", "no masks", "no maps", "equal scores", "one image"],
)
def test_what_is_missing_is_said(batch, texts, tmp_path):
    text = read(run_test(tmp_path, [batch], post_processor=make_post_processor())).rows()
    for part in texts:
        assert part in text


@pytest.mark.parametrize("post_processor", [None, make_post_processor(float("nan"))])
def test_without_threshold_nothing_is_right_or_wrong(post_processor, tmp_path):
    batch = make_batch([0.1, 0.9], [False, True])
    text = read(run_test(tmp_path, [batch], post_processor=post_processor)).rows()
    assert "There is no threshold" in text
    assert "missed" not in text
    assert "False alarm " not in text


def test_scores_that_are_not_finite(tmp_path):
    batch = make_batch([0.1, float("nan"), 0.9], [False, False, True])
    text = read(run_test(tmp_path, [batch], post_processor=make_post_processor(), evaluator=False)).rows()
    assert "1 images have no finite score" in text


def test_without_evaluator_it_says_why_there_are_no_metrics(tmp_path):
    assert "evaluator=CategoryEvaluator()" in read(two_products(tmp_path, evaluator=False)).rows()


def test_images_of_different_sizes_and_a_strip(tmp_path):
    batches = [make_batch([0.1], [False], size=size) for size in [(8, 200), (200, 8), (1, 1), (300, 200)]]
    assert "4 of 4 shown" in read(run_test(tmp_path, batches, post_processor=make_post_processor())).rows()


@pytest.mark.parametrize("order", ["random", "rising"])
def test_ten_thousand_images_are_bounded(order, tmp_path):
    scores = torch.rand(10_000)
    scores = scores.sort().values if order == "rising" else scores
    labels = (torch.rand(10_000) < 0.2).tolist()
    report = Report(max_images=20, image_size=32)
    batches = (
        make_batch(scores[i : i + 100].tolist(), labels[i : i + 100], paths=[f"/d/{j}.png" for j in range(i, i + 100)])
        for i in range(0, 10_000, 100)
    )  # fmt: skip
    kept = []

    def watched():
        for batch in batches:
            yield batch
            kept.append(sum(map(len, report._records["bolts"]._kept.values())))

    start = time.monotonic()
    path = run_test(tmp_path, watched(), report, make_post_processor(), evaluator=False)
    assert max(kept) <= 40
    assert path.stat().st_size < 400_000
    assert time.monotonic() - start < 60
    page = read(path)
    assert "20 of 10,000 shown" in page.rows()
    assert page.tags.count("article") == 20
    assert max(len(value or "") for tag, name, value in page.attributes if name == "d") < 10_000


def test_many_products_share_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_decad.report.page._MOST_IMAGES", 12)
    batches = [make_batch([0.1, 0.9, 0.2, 0.3, 0.4], [False, True] * 2 + [True], f"p{i}") for i in range(4)]
    page = read(run_test(tmp_path, batches, post_processor=make_post_processor()))
    assert page.tags.count("article") == 12


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch, capsys, caplog):
    path = two_products(tmp_path)
    before = path.read_text()
    capsys.readouterr()

    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("pathlib.Path.write_text", full)
    two_products(tmp_path, evaluator=False)
    assert path.read_text() == before
    assert "Report:" not in capsys.readouterr().out
    assert "No space left on device" in caplog.text


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=400))
def test_a_loss_of_any_course_is_drawn_within_the_chart(values):
    chart = loss_chart("loss", list(enumerate(values, 1)))
    numbers = [float(number) for series in chart.series for number in re.findall(r"[-\d.]+", series.path)]
    assert all(chart.left - 1 <= x <= chart.right + 1 for x in numbers[::2])
    assert all(chart.top - 1 <= y <= chart.bottom + 1 for y in numbers[1::2])
    assert chart.x_ticks or len(values) == 1
    assert len(chart.y_ticks) >= 1


@given(st.integers(1, 3000), st.integers(4, 50))
def test_losses_are_bounded_and_have_both_ends(steps, limit):
    curves = LossCurves(limit, first_steps=10**9)
    for step in range(1, steps + 1):
        if curves.is_due(step == steps):
            curves.add(step, {"train_loss": torch.tensor(1 / step), "train_loss_step": 1.0, "train_a_epoch": 1, "x": 2})
    assert set(curves.points) == {"loss"}
    points = curves.points["loss"]
    assert len(points) <= limit
    assert points[-1][0] == steps
    assert points[0][0] <= max(steps // limit * 4, 4)
    assert [step for step, _ in points] == sorted({step for step, _ in points})


def test_a_number_that_is_not_finite_is_left_out():
    curves = LossCurves()
    curves.add(1, {"train/loss": float("nan"), "train/a": 1.0, "train_b_step": 2.0})
    assert curves.points == {"a": [(1, 1.0)], "b": [(1, 2.0)]}


def test_later_steps_are_read_by_the_clock():
    curves = LossCurves(first_steps=3, interval=1000.0)
    assert [curves.is_due() for _ in range(6)] == [True] * 3 + [False] * 3
    assert curves.is_due(is_last=True)
