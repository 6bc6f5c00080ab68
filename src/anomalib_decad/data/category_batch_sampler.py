# SPDX-License-Identifier: Apache-2.0
"""Batches of images of one category each."""

from collections.abc import Iterable, Iterator, Sequence

from torch.utils.data import BatchSampler

__all__ = ["CategoryBatchSampler"]


class CategoryBatchSampler(BatchSampler):
    """Ends a batch where the next image is of another category.

    A batch has masks only if all of its images have them. So the images of a category without masks must not share a
    batch with those of one that has them. Where images go to several processes, all of these have as many batches,
    since they wait for each other.

    Args:
        sampler (Iterable[int]): Gives the indices of images, in their order. Lightning puts one for each process here.
        batch_size (int): Most images of a batch.
        drop_last (bool): Must be ``False``; it is here for Lightning, which gives it.
        categories (Sequence[str] | None): Category of each image of the dataset.
            Defaults to ``None``: all of one, as where Lightning makes the sampler anew of a loader that it has not seen
            made.

    Raises:
        ValueError: If ``drop_last`` is set.
    """

    def __init__(
        self, sampler: Iterable[int], batch_size: int, drop_last: bool = False, categories: Sequence[str] | None = None
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if drop_last:
            msg = "a CategoryBatchSampler drops no image"
            raise ValueError(msg)
        self.categories = categories
        self._count: int | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """Give the indices of each batch."""
        batch: list[int] = []
        before: tuple[str, ...] = ()
        for index, categories in self._indices():
            if batch and (len(batch) == self.batch_size or categories != before):
                yield batch
                batch = []
            batch.append(index)
            before = categories
        if batch:
            yield batch

    def _indices(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Give each index, with the categories of the images that all processes have at this place."""
        processes = getattr(self.sampler, "num_replicas", 1)
        for place, index in enumerate(self.sampler):
            if self.categories is None:
                yield index, ()
                continue
            # What a distributed sampler gives to each process; at its end it begins anew.
            others = range(place * processes, (place + 1) * processes) if processes > 1 else [index]
            yield index, tuple(self.categories[other % len(self.categories)] for other in others)

    def __len__(self) -> int:
        """Count the batches."""
        if self._count is None:
            self._count = sum(1 for _ in self)
        return self._count
