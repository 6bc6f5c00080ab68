import errno
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_decad.feature_cache import CachedFeatures, FeatureCode, FeatureFile, fingerprint
from anomalib_decad.feature_cache.store import default_folder, readable


class Images:
    def __init__(self, number):
        self.samples = list(range(number))


def test_code_keeps_what_varies_in_large_constant_channels():
    features = torch.randn(8, 2, 25, 4) * torch.tensor([1.0, 0.01, 30.0, 1.0]) + torch.tensor([0.0, 100.0, 5.0, -400.0])
    code = FeatureCode.from_features(features)
    decoded = code.decode(code.encode(features))
    assert code.encode(features).dtype == torch.float16
    std = features.std((0, 1, 2))
    assert ((decoded - features).abs() / std).max() < 3e-3
    plain = features.half().float()
    assert ((plain - features).abs() / std).max() > 1  # what it is good for


@given(value=st.floats(-1e6, 1e6), offset=st.floats(-100, 100), scale=st.floats(1e-3, 1e3))
def test_code_is_invertible_within_float16(value, offset, scale):
    code = FeatureCode(torch.full((1, 1, 1), offset), torch.full((1, 1, 1), scale))
    standard = (value - offset) / scale
    decoded = code.decode(code.encode(torch.full((1, 1, 1, 1), value))).item()
    if abs(standard) < 65000:
        assert decoded == pytest.approx(value, abs=scale * (abs(standard) * 2**-10 + 1e-4) + 1e-4 * abs(value) + 1e-4)
    assert np.isfinite(decoded)


def test_constant_channels_stay_finite():
    code = FeatureCode.from_features(torch.ones(4, 1, 9, 3))
    assert torch.isfinite(code.decode(code.encode(torch.ones(2, 1, 9, 3)))).all()


def test_fingerprint_changes_with_every_part(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"1")
    state = {"a": torch.arange(3.0), "b": torch.zeros(2)}
    first = fingerprint("vit", [1, 2], state, path)
    assert first == fingerprint("vit", [1, 2], {name: tensor.clone() for name, tensor in state.items()}, path)
    others = [
        fingerprint("vit2", [1, 2], state, path),
        fingerprint("vit", [1, 3], state, path),
        fingerprint("vit", [1, 2], {**state, "b": torch.ones(2)}, path),
        fingerprint("vit", [1, 2], {"a": state["a"], "c": state["b"]}, path),
    ]
    path.write_bytes(b"12")
    others.append(fingerprint("vit", [1, 2], state, path))
    assert len({first, *others}) == 6


def names(folder):
    """List a folder of caches, without the lock of all."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def write(file, shape=(3, 2, 4, 5), limit=1.0, value=1.0):
    file.create(shape, limit)
    file.write_code(FeatureCode(torch.zeros(2, 1, 5), torch.ones(2, 1, 5)))
    file.open_partial()[:] = value
    file.complete()


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = FeatureFile(tmp_path, "key")
    file.create((3, 2, 4, 5), 1.0)
    assert not file.is_complete
    assert not FeatureFile(tmp_path, "key").is_complete
    file.discard()
    assert names(tmp_path) == []
    write(file)
    assert FeatureFile(tmp_path, "key").is_complete
    assert (file.read() == 1).all()
    assert file.read_code().scale.shape == (2, 1, 5)


@pytest.mark.parametrize("damage", ["features.npy", "code.npy", "cut", "mark"])
def test_a_file_that_is_damaged_is_not_complete(damage, tmp_path):
    file = FeatureFile(tmp_path, "key")
    write(file)
    if damage == "cut":
        file.features.write_bytes(file.features.read_bytes()[:-8])
    elif damage == "mark":
        (file.path / "done.json").write_text("{")
    else:
        (file.path / damage).unlink()
    assert not file.is_complete
    write(file, value=3.0)
    assert file.is_complete
    assert (file.read() == 3).all()


def test_what_an_interrupted_run_left_is_written_anew(tmp_path):
    file = FeatureFile(tmp_path, "key")
    file.create((3, 2, 4, 5), 1.0)
    file.open_partial()[:] = 7
    again = FeatureFile(tmp_path, "key")
    assert not again.is_complete
    write(again, value=2.0)
    assert (again.read() == 2).all()
    assert names(tmp_path) == ["key"]


def test_least_recently_used_files_make_room(tmp_path):
    shape = (1000, 1, 16, 64)  # 2 MB
    limit = 4.5e6 / 2**30
    for name in "abc":
        file = FeatureFile(tmp_path, name)
        write(file, shape, limit)
        time.sleep(0.02)
        if name == "b":
            FeatureFile(tmp_path, "a").touch()
            time.sleep(0.02)
    assert [name for name in "abc" if FeatureFile(tmp_path, name).is_complete] == ["a", "c"]
    assert not (tmp_path / "b").exists()


def test_a_file_that_a_run_holds_stays(tmp_path):
    shape, limit = (1000, 1, 16, 64), 3e6 / 2**30  # one of 2 MB
    held = FeatureFile(tmp_path, "held")
    held.hold()
    write(held, shape, limit)
    write(FeatureFile(tmp_path, "other"), shape, limit)
    assert held.is_complete
    held.release()
    held.release()
    # A run that was killed has left its mark.
    (tmp_path / "held.0123.use").touch()
    write(FeatureFile(tmp_path, "third"), shape, limit)
    assert names(tmp_path) == ["third"]


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"feature_cache_dir.*feature_cache=off"):
        FeatureFile(tmp_path, "key").create((3, 2, 4, 5), 1.0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_later_is_noticed_at_once(number, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    file = FeatureFile(tmp_path, "key")
    with pytest.raises(OSError, match=r"the features need 1\.0 MiB, but .* Give another folder"):
        file.create((2, 1, 512, 512), 1.0)
    assert not file.partial.exists()


def test_the_file_takes_its_place_at_once(tmp_path):
    file = FeatureFile(tmp_path, "key")
    file.create((2, 1, 512, 512), 1.0)
    status = (file.partial / "features.npy").stat()
    assert status.st_blocks * 512 >= 2 * 2 * 512 * 512


def test_what_killed_runs_left_is_deleted_unless_it_is_being_written(tmp_path):
    dead, alive = FeatureFile(tmp_path, "dead"), FeatureFile(tmp_path, "alive")
    dead.create((2, 1, 4, 8), 1.0)
    with alive.lock():
        alive.create((2, 1, 4, 8), 1.0)
        assert not dead.partial.exists()
        dead.create((2, 1, 4, 8), 1.0)
        other = FeatureFile(tmp_path, "other")
        other.create((2, 1, 4, 8), 1.0)
        assert alive.partial.exists()
        assert not dead.partial.exists()


@pytest.mark.parametrize(("size", "text"), [(3 * 2**20, "3.0 MiB"), (1000, "0.0 MiB"), (5 * 2**29, "2.5 GiB")])
def test_sizes_are_readable(size, text):
    assert readable(size) == text


def test_only_one_writes(tmp_path):
    order = []

    def run():
        file = FeatureFile(tmp_path, "key")
        with file.lock():
            if file.is_complete:
                order.append("reads")
                return
            time.sleep(0.1)
            write(file)
            order.append("writes")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["writes", "reads"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_dataset_gives_batches_of_features(on_disk, tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 2, 4, 5)).astype(np.float16)
    source = values
    if on_disk:
        source = tmp_path / "features.npy"
        np.save(source, values)
    dataset = CachedFeatures(Images(6))
    code = FeatureCode(torch.randn(2, 1, 5), torch.rand(2, 1, 5) + 0.5)
    dataset.fill(source, code, (2, 2))
    dataset = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 5000 or not on_disk
    batch = dataset.collate_fn([dataset[index] for index in (4, 1)])
    assert len(dataset) == 6
    assert batch.image is None
    for tap, feature in enumerate(batch.features()):
        expected = torch.from_numpy(values[[4, 1], tap]).float() * code.scale[tap] + code.offset[tap]
        torch.testing.assert_close(feature, expected)


def test_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "anomalib_decad"
