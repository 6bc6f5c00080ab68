"""Batches of one category each."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, SequentialSampler

from anomalib_decad.data.category_batch_sampler import CategoryBatchSampler


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


@given(
    categories=st.lists(st.sampled_from("abc"), min_size=1, max_size=30).map(sorted),
    batch_size=st.integers(1, 9),
    processes=st.integers(2, 4),
)
def test_processes_have_as_many_batches(categories, batch_size, processes):
    """In a validation within a training they wait for each other in each batch."""
    batches = [
        list(
            CategoryBatchSampler(
                DistributedSampler(categories, processes, rank, shuffle=False), batch_size, categories=categories
            )
        )
        for rank in range(processes)
    ]
    assert len({len(mine) for mine in batches}) == 1
    assert {index for mine in batches for batch in mine for index in batch} == set(range(len(categories)))
    assert all(len({categories[index] for index in batch}) == 1 for mine in batches for batch in mine)
    assert all(len(batch) <= batch_size for mine in batches for batch in mine)


def test_no_image_is_dropped():
    with pytest.raises(ValueError, match="drops no image"):
        CategoryBatchSampler(range(3), 2, drop_last=True, categories="aab")
