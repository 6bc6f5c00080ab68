import os
import pickle
import shutil
from collections import Counter

import pytest
from anomalib.data import Folder, MVTecAD
from anomalib.data.utils import ValSplitMode
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import RandomSampler, WeightedRandomSampler

from anomalib_decad import MultiCategory
from anomalib_decad.data import CategoryBatch
from conftest import make_dataset

OPTIONS = {"num_workers": 0, "train_batch_size": 5, "eval_batch_size": 4}


def loaded(datamodule):
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


@pytest.fixture
def datamodule(mvtec_root):
    return loaded(MultiCategory("MVTecAD", ["bolts", "cloth"], mvtec_root, **OPTIONS))


def test_every_image_is_there_once_with_its_category(datamodule, mvtec_root):
    for loader, split in (
        (datamodule.train_dataloader(), "train"),
        (datamodule.test_dataloader(), "test"),
        (datamodule.val_dataloader(), "test"),
        (datamodule.predict_dataloader(), "test"),
    ):
        paths = []
        for batch in loader:
            assert isinstance(batch, CategoryBatch)
            assert batch.category == batch.to_numpy().category
            for path, category in zip(batch.image_path, batch.category, strict=True):
                assert f"/{category}/{split}/" in path
            paths += batch.image_path
        assert sorted(paths) == sorted(str(path) for path in mvtec_root.glob(f"*/{split}/*/*.png"))


def test_balanced_sampling(tmp_path):
    make_dataset(tmp_path, ("few",), num_train=4)
    make_dataset(tmp_path, ("many",), num_train=36)
    datamodule = loaded(MultiCategory("MVTecAD", ["few", "many"], tmp_path, sampling="balanced", **OPTIONS))
    counts = Counter(c for _ in range(10) for batch in datamodule.train_dataloader() for c in batch.category)
    assert counts.total() == 400
    assert counts["few"] == pytest.approx(200, abs=50)


@pytest.mark.parametrize(("epochs", "balanced"), [(1, False), (2, True), (-1, True)])
def test_sampling_is_balanced_unless_the_training_is_one_epoch(epochs, balanced, mvtec_root):
    datamodule = loaded(MultiCategory("MVTecAD", root=mvtec_root, **OPTIONS))
    assert isinstance(datamodule.train_dataloader().sampler, RandomSampler)
    datamodule.trainer = Trainer(max_epochs=epochs, max_steps=5, logger=False, accelerator="cpu")
    assert type(datamodule.train_dataloader().sampler) is (WeightedRandomSampler if balanced else RandomSampler)


@pytest.mark.parametrize("wrapped", ["MVTecAD", "anomalib.data.MVTecAD", MVTecAD])
def test_names_and_classes(wrapped, mvtec_root):
    assert MultiCategory(wrapped, ["bolts"], mvtec_root).categories == ["bolts"]


def test_instance_is_the_template(mvtec_root):
    template = MVTecAD(root=mvtec_root, val_split_mode=ValSplitMode.FROM_TEST, val_split_ratio=0.5, seed=1)
    datamodule = loaded(MultiCategory(template, ["bolts", "cloth"], **OPTIONS))
    assert len(datamodule.val_data) == 4
    assert len(datamodule.test_data) == 8
    assert set(datamodule.val_data.samples.category) == {"bolts", "cloth"}


def test_split_modes_go_to_the_wrapped_datamodule(mvtec_root):
    datamodule = loaded(
        MultiCategory("MVTecAD", ["bolts", "cloth"], mvtec_root, val_split_mode="synthetic", seed=1, **OPTIONS)
    )
    labels = datamodule.val_data.samples.groupby("category").label_index.value_counts()
    assert labels["bolts", 1] > 0
    assert labels["cloth", 1] > 0
    assert next(iter(datamodule.val_dataloader())).gt_mask is not None


@pytest.mark.parametrize(
    ("name", "number"),
    [("MVTecAD", 15), ("MVTecAD2", 8), ("MVTecLOCO", 5), ("Visa", 12), ("RealIAD", 30), ("BTech", 3), ("MPDD", 6),
     ("Kaputt", None), ("AutoVI", 6)],
)  # fmt: skip
def test_all_datamodules_with_categories(name, number, tmp_path):
    datamodule = MultiCategory(name, root=tmp_path)
    assert len(datamodule.categories) == (number or len(datamodule.categories)) > 1
    for category, module in datamodule.datamodules.items():
        assert type(module).__name__ == name
        assert module.category == category
        assert str(module.root) == str(tmp_path)


@pytest.mark.parametrize("name", ["mean", "unknown"])
def test_a_category_that_would_be_lost_in_the_tables_is_refused(name, mvtec_root, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(mvtec_root, root)
    (root / "bolts").rename(root / name)
    with pytest.raises(ValueError, match=f"a category cannot be called '{name}', .* rename its folder"):
        MultiCategory("MVTecAD", root=root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"datamodule": "MVTecAD", "categories": ["botle"]}, "no category 'botle'; valid names are bottle, cable"),
        ({"datamodule": "MVTecAD", "categories": ["bottle", "bottle"]}, "must be different"),
        ({"datamodule": "MVTecAD", "categories": []}, "no categories"),
        ({"datamodule": "MVTec"}, "anomalib has no 'MVTec'; those with categories are .*MVTecAD.*Visa"),
        ({"datamodule": "Kolektor"}, "Kolektor has no categories"),
        ({"datamodule": "MVTecAD2", "test_split_mode": "from_dir"}, "MVTecAD2 takes no test_split_mode"),
        ({"datamodule": "MVTecAD", "datamodule_args": {"resolution": 256}}, "MVTecAD takes no resolution"),
        ({"datamodule": "Folder"}, "Folder needs root, and datamodule_args with normal_dir"),
        ({"datamodule": "MVTecAD", "sampling": "random"}, "sampling must be"),
        ({"datamodule": "MVTecAD", "bit_depth": 4}, "bit_depth must be"),
        ({"datamodule": MVTecAD(), "root": "elsewhere"}, "root: give these to the MVTecAD"),
        ({"datamodule": []}, "list of 0 datamodules"),
        ({"datamodule": [MVTecAD(), MVTecAD()]}, "as many different category names"),
    ],
)
def test_wrong_arguments_get_the_valid_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCategory(**arguments)


def test_unreadable_category_is_named(tmp_path):
    make_dataset(tmp_path, ("good",))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="the category 'empty' cannot be read"):
        MultiCategory("MVTecAD", ["good", "empty"], tmp_path).setup()


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, 8)])
def test_no_more_workers_than_cores(cores, expected, mvtec_root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert MultiCategory("MVTecAD", root=mvtec_root).num_workers == expected
    assert MultiCategory("MVTecAD", root=mvtec_root, num_workers=3).num_workers == 3


class CategoriesOfBatches(LightningModule):
    def predict_step(self, batch):
        return batch.category


def test_list_of_folders_with_and_without_masks(mvtec_root):
    def folder(name, **kwargs):
        folders = {"normal_dir": "train/good", "abnormal_dir": "test/square", "normal_test_dir": "test/good"}
        return Folder(name=name, root=mvtec_root / name, **folders, val_split_mode="same_as_test", **kwargs)

    modules = [folder("bolts", mask_dir="ground_truth/square"), folder("cloth")]
    datamodule = loaded(MultiCategory(modules, num_workers=0, eval_batch_size=12))
    assert datamodule.categories == ["bolts", "cloth"]
    # A product without masks takes none from the others, and no batch is lost.
    for loader in (datamodule.test_dataloader(), datamodule.val_dataloader()):
        batches = list(loader)
        assert len(loader) == len(batches) == 2
        assert [set(batch.category) for batch in batches] == [{"bolts"}, {"cloth"}]
        assert [batch.gt_mask is not None for batch in batches] == [True, False]
        assert [int(batch.gt_label.sum()) for batch in batches] == [3, 3]
    # Lightning makes a sampler of its own for a prediction, as it does for several processes.
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    assert trainer.predict(CategoriesOfBatches(), datamodule=datamodule) == [["bolts"] * 6, ["cloth"] * 6]
    assert trainer.predict(CategoriesOfBatches(), datamodule.test_dataloader()) == [["bolts"] * 6 + ["cloth"] * 6]


def test_a_dataset_goes_to_other_processes(datamodule):
    assert pickle.loads(pickle.dumps(datamodule.train_data))[0].category == "bolts"


def test_augmentations_reach_every_category(mvtec_root):
    from torchvision.transforms.v2 import Resize

    datamodule = loaded(MultiCategory("MVTecAD", root=mvtec_root, augmentations=Resize((32, 40)), **OPTIONS))
    assert {tuple(batch.image.shape[-2:]) for batch in datamodule.train_dataloader()} == {(32, 40)}
