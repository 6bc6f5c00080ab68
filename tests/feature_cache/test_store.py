"""Features as half-precision numbers, and their files."""

import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.feature_cache import FeatureCode, load_or_build

SHAPE = (1000, 1, 16, 64)  # 2 MB
CODE = FeatureCode(torch.zeros(1, 1, 64), torch.ones(1, 1, 64))


def load(folder, key, limit=1.0, value=1.0, shape=SHAPE):
    """Give the features of a key, and whether they had to be built."""
    built = []

    def build(write):
        write(np.full(shape, value, np.float16))
        built.append(value)
        return CODE

    features, code = load_or_build(folder, key, shape, limit, build)
    torch.testing.assert_close(code.scale, CODE.scale)
    return features, bool(built)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_code_keeps_what_varies_in_large_constant_channels():
    features = torch.randn(8, 2, 25, 4) * torch.tensor([1.0, 0.01, 30.0, 1.0]) + torch.tensor([0.0, 100.0, 5.0, -400.0])
    code = FeatureCode.from_features(features)
    decoded = code.decode(code.encode(features))
    assert code.encode(features).dtype == torch.float16
    std = features.std((0, 1, 2))
    assert ((decoded - features).abs() / std).max() < 3e-3
    assert ((features.half().float() - features).abs() / std).max() > 1  # what it is good for
    constant = FeatureCode.from_features(torch.ones(4, 1, 9, 3))
    assert torch.isfinite(constant.decode(constant.encode(torch.ones(2, 1, 9, 3)))).all()


@given(value=st.floats(-1e6, 1e6), offset=st.floats(-100, 100), scale=st.floats(1e-3, 1e3))
def test_code_is_invertible_within_float16(value, offset, scale):
    code = FeatureCode(torch.full((1, 1, 1), offset), torch.full((1, 1, 1), scale))
    standard = (value - offset) / scale
    decoded = code.decode(code.encode(torch.full((1, 1, 1, 1), value))).item()
    if abs(standard) < 65000:
        assert decoded == pytest.approx(value, abs=scale * (abs(standard) * 2**-10 + 1e-4) + 1e-4 * abs(value) + 1e-4)
    assert np.isfinite(decoded)


def test_a_file_is_built_once(tmp_path):
    features, is_new = load(tmp_path / "new", "key")
    assert is_new
    assert (features == 1).all()
    assert names(tmp_path / "new") == ["key.npy"]
    features, is_new = load(tmp_path / "new", "key", value=2.0)
    assert not is_new
    assert (features == 1).all()


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: data[:5000], lambda _: b"", lambda _: b"x"])
def test_a_damaged_file_is_built_again(damage, tmp_path):
    load(tmp_path, "key")
    path = tmp_path / "key.npy"
    path.write_bytes(damage(path.read_bytes()))
    features, is_new = load(tmp_path, "key", value=3.0)
    assert is_new
    assert (features == 3).all()


def test_what_fails_leaves_no_file(tmp_path):
    def fail(_):
        raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError, match="the encoder failed"):
        load_or_build(tmp_path, "key", SHAPE, 1.0, fail)
    assert names(tmp_path) == []
    (tmp_path / ".dead.npy.partial").touch()  # of a run that was killed
    assert load(tmp_path, "key")[1]
    assert names(tmp_path) == ["key.npy"]


def test_least_recently_used_files_make_room(tmp_path):
    limit = 4.5e6 / 2**30
    for key in ("a", "b", "a", "c"):
        features, _ = load(tmp_path, key, limit, value=ord(key))
        time.sleep(0.02)
    assert names(tmp_path) == ["a.npy", "c.npy"]
    load(tmp_path, "d", 2.1e6 / 2**30)
    assert names(tmp_path) == ["d.npy"]
    assert (features == ord("c")).all()  # a run keeps what it has


def test_a_full_disk_is_one_clear_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"^feature_cache: 0\.00191 GiB cannot be written to .* give another folder"):
        load_or_build(tmp_path, "key", SHAPE, 1.0, pytest.fail)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_is_the_same_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^feature_cache: .* give another folder"):
            load(tmp_path, "key")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_only_one_builds(tmp_path):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda value: load(tmp_path, "key", value=value), [1.0, 2.0]))
    assert sorted(is_new for _, is_new in found) == [False, True]
    assert (found[0][0] == found[1][0]).all()
