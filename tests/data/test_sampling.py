"""Batches of one category each, and the images that are left of an epoch."""

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from anomalib_decad import MultiCategory
from anomalib_decad.data.sampling import CategoryBatchSampler, ResumableDataLoader


@given(categories=st.lists(st.sampled_from("abc"), max_size=30), batch_size=st.integers(1, 9))
def test_batches_are_of_one_category_and_hold_all_images_in_order(categories, batch_size):
    sampler = CategoryBatchSampler(SequentialSampler(categories), batch_size, categories=categories)
    batches = list(sampler)
    assert [index for batch in batches for index in batch] == list(range(len(categories)))
    assert len(sampler) == len(batches)
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert all(len({categories[index] for index in batch}) == 1 for batch in batches)
    for before, after in itertools.pairwise(batches):
        assert len(before) == batch_size or categories[before[-1]] != categories[after[0]]


@given(categories=st.lists(st.sampled_from("abc"), min_size=1, max_size=30).map(sorted), batch_size=st.integers(1, 9),
       processes=st.integers(2, 4))  # fmt: skip
def test_processes_have_as_many_batches(categories, batch_size, processes):
    """In a validation within a training they wait for each other in each batch."""
    samplers = [DistributedSampler(categories, processes, rank, shuffle=False) for rank in range(processes)]
    batches = [list(CategoryBatchSampler(sampler, batch_size, categories=categories)) for sampler in samplers]
    assert len({len(mine) for mine in batches}) == 1
    every = [batch for mine in batches for batch in mine]
    assert {index for batch in every for index in batch} == set(range(len(categories)))
    assert all(len({categories[index] for index in batch}) == 1 and len(batch) <= batch_size for batch in every)


def make_loader(balanced=False, num_workers=0, batch_size=3, size=20):
    sampler = WeightedRandomSampler([1.0] * size, size) if balanced else RandomSampler(range(size))
    return ResumableDataLoader(list(range(size)), batch_size, sampler=sampler, num_workers=num_workers)


def saved(state):
    """Save and load a state as Lightning does in a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    assert len(file.getvalue()) < 3000
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(batches):
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 2), (2, 0)])
def test_a_new_loader_goes_on_where_the_old_one_was(balanced, workers, workers_after):
    loader = make_loader(balanced, workers)
    batches = iter(loader)
    seen = values(itertools.islice(batches, 3))
    state, generator_state = saved(loader.state_dict()), torch.get_rng_state()
    left = values(batches)
    if not balanced:
        assert sorted(itertools.chain(*seen, *left)) == list(range(20))
    resumed = make_loader(balanced, workers_after)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state_dict()["left"], state["left"])
    torch.set_rng_state(generator_state)
    batches = iter(resumed)
    again = [next(batches).tolist()]
    assert torch.equal(torch.get_rng_state(), generator_state)  # the random numbers of the training go on, too
    state = saved(resumed.state_dict())
    again += values(batches)
    assert again == left
    assert len(values(resumed)) == 7  # the next epoch is a whole one
    twice = make_loader(balanced)
    twice.load_state_dict(state)
    assert values(twice) == left[1:]


def test_the_end_of_an_epoch_is_the_beginning_of_the_next():
    loader = make_loader()
    values(itertools.islice(loader, 7))  # Lightning does not ask for more
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert sorted(itertools.chain(*values(resumed))) == list(range(20))


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"size": 21}])
def test_another_epoch_is_drawn_anew(options, caplog):
    loader = make_loader()
    next(iter(loader))
    resumed = make_loader(**options)
    resumed.load_state_dict(loader.state_dict())
    assert len(values(resumed)) == len(resumed)
    assert caplog.text.count("The checkpoint is from within an epoch of 20 images in batches of 3, and now there ") == 1


def test_a_distributed_run_keeps_no_state():
    loader = ResumableDataLoader(range(20), 3, sampler=DistributedSampler(range(20), 2, 0))
    next(iter(loader))
    assert loader.state_dict() == {}
    resumed = make_loader()
    resumed.load_state_dict({})
    assert len(values(resumed)) == 7


class Paths(LightningModule):
    """Keeps the paths of the batches that it has seen."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.seen, self.stop_at = [], stop_at

    def training_step(self, batch):
        self.seen.append(batch.image_path)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.seen) == self.stop_at:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/last.ckpt")

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # makes the dataloader before Lightning has loaded its state


@pytest.mark.parametrize("batch_size", [5, 4, 12])
def test_a_training_is_resumed_within_an_epoch(batch_size, mvtec_root, tmp_path, caplog):
    """Epochs of three batches: a checkpoint of the fifth one."""
    options = {"max_epochs": 4, "logger": False, "accelerator": "cpu", "enable_progress_bar": False,
               "enable_model_summary": False, "default_root_dir": tmp_path, "limit_val_batches": 0,
               "enable_checkpointing": False}  # fmt: skip
    data = {"num_workers": 0, "root": mvtec_root}
    torch.manual_seed(0)
    unbroken, resumed = Paths(stop_at=5), Paths()
    Trainer(**options).fit(unbroken, datamodule=MultiCategory("MVTecAD", train_batch_size=5, **data))
    assert len(unbroken.seen) == 12
    datamodule = MultiCategory("MVTecAD", train_batch_size=batch_size, **data)
    Trainer(**options).fit(resumed, datamodule=datamodule, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    if batch_size == 5:
        assert resumed.seen[0] == unbroken.seen[5]
        assert len(resumed.seen) == 7
        assert "anew" not in caplog.text
    else:
        assert sum(len(paths) for paths in resumed.seen) >= 24  # two whole epochs
        assert caplog.text.count("their order is drawn anew") == 1
