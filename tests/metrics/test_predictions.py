"""What metrics and callbacks read of batches and post-processors."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from anomalib_decad.data.sampling import CategoryBatchSampler
from anomalib_decad.metrics import (
    gather,
    lacks_threshold,
    num_own_images,
    own_images,
    raw_maps_of,
    raw_scores_of,
)
from anomalib_decad.thresholds import CategoryPostProcessor
from conftest import validated

SCORES = torch.tensor([0.2, 7.0, -3.0, 7.5])


def test_scores_and_maps_stay_as_the_model_gave_them():
    maps = torch.rand(4, 1, 5, 6)
    batch = ImageBatch(image=torch.zeros(4, 3, 4, 4), pred_score=SCORES, anomaly_map=maps)
    validated(CategoryPostProcessor()).post_process_batch(batch)
    assert batch.pred_score.max() <= 1
    assert torch.equal(raw_scores_of(batch), SCORES)
    assert torch.equal(raw_maps_of(batch), maps.squeeze(1))


def test_the_largest_value_of_the_map_where_there_is_no_score():
    maps = torch.rand(4, 1, 5, 6)
    assert torch.equal(raw_scores_of(SimpleNamespace(anomaly_map=maps)), maps.amax((1, 2, 3)))
    assert raw_scores_of(SimpleNamespace()) is None


def test_without_a_validation_labels_mean_nothing():
    post_processor = CategoryPostProcessor()
    assert lacks_threshold(post_processor)
    assert not lacks_threshold(validated(post_processor), "pixel")
    assert not lacks_threshold(None)


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
    is_list=st.booleans(), by_category=st.booleans(),
)  # fmt: skip
def test_processes_count_each_image_once(testing, count, processes, batch_size, is_list, by_category):
    categories = [str(number // 3) for number in range(count)] if by_category else None
    counted = []
    for rank in range(processes):
        loader = _loader(count, processes, rank, batch_size, categories)
        loaders = [[], loader] if is_list else loader
        trainer = SimpleNamespace(
            world_size=processes, testing=testing, **{"test_dataloaders" if testing else "val_dataloaders": loaders}
        )
        for number, batch in enumerate(loader):
            own = own_images(trainer, batch, number, int(is_list))
            found = [] if own is None else own.pred_score.tolist()
            assert len(found) == num_own_images(trainer, len(batch.image), number, int(is_list))
            if own is not None:
                assert own.image[:, 0, 0, 0].tolist() == found
                assert own.gt_label.tolist() == [number > 1 for number in found]
                assert own.image_path == [f"{number:.0f}.png" for number in found]
            counted += found
    assert sorted(counted) == list(range(count))


def test_one_process_counts_all():
    batch = Numbers.collate([1, 2])
    assert own_images(SimpleNamespace(world_size=1), batch, 0) is batch


def test_a_sampler_of_ones_own_is_left_alone():
    loader = DataLoader(Numbers(4), 2, collate_fn=Numbers.collate)
    trainer = SimpleNamespace(world_size=2, testing=True, test_dataloaders=loader)
    for number, batch in enumerate(loader):
        assert own_images(trainer, batch, number) is batch


def test_alone_it_is_the_value_itself():
    value = object()
    assert gather(value) == [value]
