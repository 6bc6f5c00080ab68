"""Which categories there are: what is in the folder counts."""

import pytest
from anomalib.data import MVTecAD

from anomalib_decad import MultiCategory
from conftest import make_dataset


def test_what_is_in_the_folder_counts(tmp_path):
    make_dataset(tmp_path, ("bottle", "gear"), num_train=1, num_test=1)
    datamodule = MultiCategory("MVTecAD", root=tmp_path)
    assert datamodule.categories == ["bottle", "gear"]
    datamodule.prepare_data()
    with pytest.raises(ValueError, match=f"no category 'grid'; valid names are bottle, gear, those in {tmp_path}$"):
        MultiCategory("MVTecAD", ["bottle", "grid"], tmp_path)


def test_folders_that_are_no_category_are_named(tmp_path, caplog):
    make_dataset(tmp_path, ("gear",), num_train=1, num_test=1)
    (tmp_path / "nut" / "good").mkdir(parents=True)
    assert MultiCategory("MVTecAD", root=tmp_path).categories == ["gear"]
    assert "nut are no categories, as they have no train." in caplog.text


def test_a_folder_without_categories_is_refused(tmp_path):
    (tmp_path / "mvtec" / "bottle").mkdir(parents=True)
    with pytest.raises(ValueError, match="no categories found in .*, which has mvtec: a category is a folder with"):
        MultiCategory("MVTecAD", root=tmp_path)


@pytest.mark.parametrize("create", [lambda root: MultiCategory("MVTecAD", root=root),
                                    lambda root: MultiCategory("MVTecAD", ["bottle"], root),
                                    lambda root: MultiCategory(MVTecAD(root))])  # fmt: skip
def test_a_mistyped_root_is_refused_and_not_made(create, tmp_path):
    with pytest.raises(ValueError, match="no folder .*MVTecDA: make it for MVTecAD to be put or downloaded into it"):
        create(tmp_path / "MVTecDA")
    assert not (tmp_path / "MVTecDA").exists()


@pytest.mark.parametrize("files", [(), (".hidden", "mvtec.tar.xz")])
def test_a_folder_without_images_gets_all_categories(files, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    assert len(MultiCategory("MVTecAD", root=tmp_path).categories) == 15


def test_the_root_of_the_dataset_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(MultiCategory("MVTecAD").categories) == 15
    assert len(MultiCategory("MVTecAD", root="./datasets/MVTecAD").categories) == 15
    assert len(MultiCategory("AutoVI").categories) == 6
