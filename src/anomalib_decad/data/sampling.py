# SPDX-License-Identifier: Apache-2.0
"""In which order images are given, and which of them make a batch."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

__all__ = ["CategoryBatchSampler", "ResumableDataLoader"]

logger = logging.getLogger(__name__)


class ResumableDataLoader(DataLoader):
    """Training dataloader whose state is the images that are left of an epoch, in their order.

    Lightning keeps the state in its checkpoints, and a training resumed from within an epoch goes on with these images.
    Nothing is read twice. The state is empty in a distributed run.
    """

    _order: Sequence[int] = ()
    _left: Sequence[int] | None = None
    _num_batches = 0
    _is_warned = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Give the batches of an epoch, or those that are left of it."""
        generator_state, left = torch.get_rng_state(), self._left
        self._order, self._left, self._num_batches = left or list(self.sampler), None, 0
        options: dict[str, Any] = {"collate_fn": self.collate_fn, "worker_init_fn": self.worker_init_fn}
        loader = DataLoader(self.dataset, self.batch_size, sampler=self._order, num_workers=self.num_workers, **options)
        batches = iter(loader)
        if left:  # the unbroken run has drawn the seed of its workers before
            torch.set_rng_state(generator_state)
        for batch in batches:
            self._num_batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Give the indices of the images that are left, and the size of their epoch."""
        if isinstance(self.sampler, DistributedSampler):
            return {}
        left = self._left or self._order[self._num_batches * (self.batch_size or 1) :]
        return {"left": torch.tensor(left), "num_images": len(self.sampler), "batch_size": self.batch_size}  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the images that are left, if the epoch has the same images and batches as before."""
        if not state_dict or not len(state_dict["left"]):
            return
        before = state_dict["num_images"], state_dict["batch_size"]
        now = len(self.sampler), self.batch_size  # type: ignore[arg-type]
        if before == now:
            self._left = state_dict["left"].tolist()
        elif not self._is_warned:
            self._is_warned = True
            logger.warning("The checkpoint is from within an epoch of %d images in batches of %d, and now there are %d "
                           "in batches of %d: their order is drawn anew.", *before, *now)  # fmt: skip


class CategoryBatchSampler(BatchSampler):
    """Ends a batch where the next image is of another category.

    A batch has masks only if all of its images have them, so a category without masks shares no batch with others.
    Processes of a distributed run have equally many batches, since they wait for each other.

    Args:
        sampler (Iterable[int]): Gives the indices of images. Lightning puts one for each process here.
        batch_size (int): Most images of a batch.
        drop_last (bool): Of Lightning; no image is dropped.
        categories (Sequence[str]): Category of each image of the dataset; none if all images are of one.
    """

    def __init__(
        self, sampler: Iterable[int], batch_size: int, drop_last: bool = False, categories: Sequence[str] = ()
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.categories = categories

    def __iter__(self) -> Iterator[list[int]]:
        """Give the indices of each batch."""
        batch: list[int] = []
        before: list[str] = []
        count = getattr(self.sampler, "num_replicas", 1)
        for place, index in enumerate(self.sampler):
            # The images that all processes have at this place; at its end a distributed sampler begins anew.
            places = range(place * count, (place + 1) * count) if count > 1 else [index]
            now = [self.categories[other % len(self.categories)] for other in places] if self.categories else []
            if batch and (len(batch) == self.batch_size or now != before):
                yield batch
                batch = []
            batch.append(index)
            before = now
        if batch:
            yield batch

    def __len__(self) -> int:
        """Count the batches."""
        return sum(1 for _ in self)
