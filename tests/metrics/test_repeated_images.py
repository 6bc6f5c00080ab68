"""What several processes count together."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from anomalib_decad.data.category_batch_sampler import CategoryBatchSampler
from anomalib_decad.metrics import num_own_images, without_repeated


class Numbers(Dataset):
    """The numbers from 0 on, as anomalib's batches of images."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index

    @staticmethod
    def collate(numbers):
        values = torch.tensor(numbers, dtype=torch.float32)
        return ImageBatch(
            image=values[:, None, None, None].expand(-1, 3, 2, 2), gt_label=values > 1, pred_score=values,
            image_path=[f"{number}.png" for number in numbers],
        )  # fmt: skip


def _loader(count, processes, rank, batch_size, categories=None):
    numbers = Numbers(count)
    sampler = DistributedSampler(numbers, processes, rank, shuffle=False)
    if categories is None:
        return DataLoader(numbers, batch_size, sampler=sampler, collate_fn=numbers.collate)
    batches = CategoryBatchSampler(sampler, batch_size, categories=categories)
    return DataLoader(numbers, batch_sampler=batches, collate_fn=numbers.collate)


@pytest.mark.parametrize("testing", [False, True])
@given(
    count=st.integers(1, 13), processes=st.integers(2, 5), batch_size=st.integers(1, 4),
    kind=st.sampled_from(["one", "list", "dict"]), by_category=st.booleans(),
)  # fmt: skip
def test_processes_count_each_image_once(testing, count, processes, batch_size, kind, by_category):
    categories = [str(number // 3) for number in range(count)] if by_category else None
    counted = []
    for rank in range(processes):
        loader = _loader(count, processes, rank, batch_size, categories)
        loaders = {"one": loader, "list": [[], loader], "dict": {"a": [], "b": loader}}[kind]
        index = int(kind != "one")
        trainer = SimpleNamespace(
            world_size=processes, testing=testing, **{"test_dataloaders" if testing else "val_dataloaders": loaders}
        )
        for number, batch in enumerate(loader):
            own = without_repeated(trainer, batch, number, index)
            found = [] if own is None else own.pred_score.tolist()
            assert len(found) == num_own_images(trainer, len(batch.image), number, index)
            if own is not None:
                assert own.image[:, 0, 0, 0].tolist() == found
                assert own.gt_label.tolist() == [number > 1 for number in found]
                assert own.image_path == [f"{number:.0f}.png" for number in found]
            counted += found
    assert sorted(counted) == list(range(count))


def test_one_process_counts_all():
    batch = Numbers.collate([1, 2])
    assert without_repeated(SimpleNamespace(world_size=1), batch, 0) is batch


def test_a_sampler_of_ones_own_is_left_alone():
    loader = DataLoader(Numbers(4), 2, collate_fn=Numbers.collate)
    trainer = SimpleNamespace(world_size=2, testing=True, test_dataloaders=loader)
    for number, batch in enumerate(loader):
        assert without_repeated(trainer, batch, number) is batch
