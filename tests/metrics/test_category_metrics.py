import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_decad.metrics import METRICS, CategoryMetrics, region_weights


@pytest.mark.parametrize("arguments", [{"max_fpr": 0.0}, {"max_fpr": float("nan")}, {"max_bins": 1}])
def test_ranges_are_checked_before_there_are_scores(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CategoryMetrics(**arguments)


def brute_force_aupro(maps, masks, max_fpr=0.3):
    """Mean overlap with each region over the false positive rate, at every threshold."""
    points = [(0.0, 0.0)]
    regions = []
    for index, mask in enumerate(masks):
        labelled, count = label(mask, structure=np.ones((3, 3)))
        regions += [(index, labelled == number) for number in range(1, count + 1)]
    for threshold in np.unique(maps)[::-1]:
        flagged = maps >= threshold
        overlap = np.mean([flagged[index][region].mean() for index, region in regions])
        points.append((flagged[~masks].mean(), overlap))
    fpr, pro = np.array(points).T
    end = np.interp(max_fpr, fpr, pro)
    inside = fpr < max_fpr
    return np.trapezoid(np.append(pro[inside], end), np.append(fpr[inside], max_fpr)) / max_fpr


def random_case(rng, images=4, size=12, levels=None):
    masks = np.zeros((images, size, size), bool)
    for mask in masks[1:]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, size - 3, 2)
            mask[y : y + rng.integers(1, 4), x : x + rng.integers(1, 4)] = True
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32)
    if levels:
        maps = np.round(maps * levels) / levels
    return maps, masks


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([None, 1, 3]))
def test_pixel_metrics_equal_brute_force(seed, levels):
    maps, masks = random_case(np.random.default_rng(seed), levels=levels)
    metrics = CategoryMetrics()
    labels = torch.from_numpy(masks.any((1, 2)))
    for part in (slice(0, 3), slice(3, 4)):
        maps_, masks_ = torch.from_numpy(maps[part])[:, None], torch.from_numpy(masks[part])
        metrics.update(["a"] * len(maps_), maps_.flatten(1).amax(1), labels[part], maps_, masks_)
    row = metrics.compute()["a"]
    assert row["pixel_AUPRO"] == pytest.approx(brute_force_aupro(maps, masks), abs=1e-6)
    assert row["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert row["pixel_AP"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert row["image_AUROC"] == pytest.approx(roc_auc_score(labels, maps.max((1, 2))), abs=1e-9)


def test_categories_are_kept_apart_and_averaged():
    rng = np.random.default_rng(0)
    together, alone = CategoryMetrics(), {}
    cases = {name: random_case(rng) for name in ("b", "a")}
    for index in range(4):
        names = list(cases)
        maps = torch.from_numpy(np.stack([cases[name][0][index] for name in names]))
        masks = torch.from_numpy(np.stack([cases[name][1][index] for name in names]))
        together.update(names, maps.flatten(1).amax(1), masks.flatten(1).any(1), maps, masks)
    for name, (maps, masks) in cases.items():
        maps, masks = torch.from_numpy(maps), torch.from_numpy(masks)
        alone[name] = CategoryMetrics()
        alone[name].update([name] * 4, maps.flatten(1).amax(1), masks.flatten(1).any(1), maps, masks)
    table = together.compute()
    assert list(table) == ["a", "b", "mean"]
    for name, metrics in alone.items():
        assert table[name] == pytest.approx(metrics.compute()[name])
    for metric in METRICS:
        assert table["mean"][metric] == pytest.approx((table["a"][metric] + table["b"][metric]) / 2)
    assert table["mean"]["mAD"] == pytest.approx(np.mean(list(table["mean"].values())))


def test_images_without_masks_leave_the_pixel_metrics_out():
    metrics = CategoryMetrics()
    metrics.update(["a", "b"], torch.rand(2), torch.tensor([0, 1]), torch.rand(2, 4, 4), torch.ones(2, 4, 4))
    metrics.update(["a"], torch.rand(1), torch.tensor([1]))
    row = metrics.compute()["a"]
    assert np.isnan(row["pixel_AUROC"])
    assert not np.isnan(row["image_AUROC"])
    assert metrics.without_masks == {"a"}


def test_merging_is_updating():
    maps, masks = (torch.from_numpy(array) for array in random_case(np.random.default_rng(3), images=6))
    whole, parts = CategoryMetrics(), [CategoryMetrics(), CategoryMetrics()]
    for index in range(6):
        arguments = (["a"], maps[index : index + 1].amax((1, 2)), masks[index : index + 1].any(-1).any(-1))
        for metrics in (whole, parts[index % 2]):
            metrics.update(*arguments, maps[index : index + 1], masks[index : index + 1])
    parts[0].merge(parts[1])
    assert parts[0].compute()["a"] == pytest.approx(whole.compute()["a"])


def test_weights_of_a_region_add_up_to_one():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, :3] = True
    mask[4:6, 4:6] = mask[6, 6] = True  # touch at a corner: one region
    weights = region_weights(mask)
    torch.testing.assert_close(weights[0, :3], torch.full((3,), 1 / 3))
    torch.testing.assert_close(weights[4:7, 4:7][mask[4:7, 4:7]], torch.full((5,), 1 / 5))
    assert weights[~mask].sum() == 0
