"""Folders of failed runs."""

from types import SimpleNamespace

import pytest
from anomalib.utils.path import create_versioned_dir

from anomalib_decad.command_line.folders import Folders


@pytest.fixture
def engine():
    return SimpleNamespace(create_versioned_dir=create_versioned_dir)


def watched(engine):
    folders = Folders()
    folders.watch(engine)
    return folders


def test_an_empty_run_goes_with_the_folders_made_for_it(engine, tmp_path):
    folders = watched(engine)
    run = engine.create_versioned_dir(tmp_path / "results" / "DecAD" / "factory")
    (run / "config.yaml").touch()
    (run / "weights" / "lightning").mkdir(parents=True)
    folders.remove_unused()
    assert not list(tmp_path.iterdir())


def test_a_run_with_results_stays(engine, tmp_path):
    folders = watched(engine)
    run = engine.create_versioned_dir(tmp_path / "results")
    (run / "weights").mkdir()
    (run / "weights" / "model.ckpt").touch()
    folders.remove_unused()
    assert (tmp_path / "results" / "latest" / "weights" / "model.ckpt").is_file()


def test_latest_is_the_run_before_again(engine, tmp_path):
    first = watched(engine).__class__()
    first.watch(engine)
    (engine.create_versioned_dir(tmp_path) / "metrics.json").touch()
    folders = watched(engine)
    engine.create_versioned_dir(tmp_path)
    folders.remove_unused()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "v0"]
    assert (tmp_path / "latest" / "metrics.json").is_file()


def test_latest_can_be_moved(engine, tmp_path):
    watched(engine)
    (engine.create_versioned_dir(tmp_path / "here") / "metrics.json").touch()
    (tmp_path / "here").rename(tmp_path / "there")
    assert (tmp_path / "there" / "latest" / "metrics.json").is_file()


def test_anomalib_is_left_as_it_was(engine):
    folders = watched(engine)
    assert engine.create_versioned_dir is not create_versioned_dir
    folders.release()
    assert engine.create_versioned_dir is create_versioned_dir
