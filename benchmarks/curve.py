# SPDX-License-Identifier: Apache-2.0
"""Scores on the way of a training, which goes on where it was cut off; images that are read once."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from anomalib_decad.metrics import CategoryMetrics
from tables import rounded, table_of

__all__ = ["Curve", "preload"]


class Curve(Callback):
    """Scores the test images every so many steps, and keeps a checkpoint there.

    The points are lines of ``curve.jsonl`` in a folder, with steps, seconds of training so far and the metrics of each
    category, and in the checkpoint, too. Seconds are those of preparing and training alone, over all parts of a
    training that was cut off.

    Args:
        folder (Path): Where the points and the checkpoint ``last.ckpt`` are.
        every (int): Steps between points.
    """

    def __init__(self, folder: Path, every: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "curve.jsonl"
        self.checkpoint = folder / "last.ckpt"
        self.every = every
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._start = time.perf_counter()

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint of a training that was cut off, if there is one."""
        return self.checkpoint if self.checkpoint.is_file() else None

    def state_dict(self) -> dict[str, Any]:
        """Keep the points in the checkpoint, which so has all of them, whenever the training is cut off."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the points of a checkpoint."""
        self.points = state_dict["points"]
        self.seconds = self.points[-1]["training_seconds"]
        self._write()

    def _write(self) -> None:
        with self.file.open("w") as file:
            file.writelines(json.dumps(point) + "\n" for point in self.points)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not count again what a training did before it was cut off."""
        del trainer, pl_module
        if self.points:
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Score at the chosen steps and at the last one."""
        step = trainer.global_step
        is_due = step % self.every == 0 or step == trainer.max_steps
        if not is_due or (self.points and self.points[-1]["step"] >= step):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        with isolate_rng():
            table = rounded(score(trainer, pl_module))
        self.points.append({"step": step, "training_seconds": round(self.seconds, 2), "metrics": table})
        trainer.save_checkpoint(self.checkpoint.with_suffix(".partial"))
        self.checkpoint.with_suffix(".partial").replace(self.checkpoint)
        self._write()
        print(f"{step} steps, {self.seconds:.0f} s: {100 * table['mean']['mAD']:.1f}", flush=True)
        self._start = time.perf_counter()


@torch.no_grad()
def score(trainer: Trainer, module: Any) -> dict[str, dict[str, float]]:
    """Compute the seven metrics on the test images of the trainer's datamodule, as its test would."""
    metrics = CategoryMetrics()
    module.eval()
    for batch in trainer.datamodule.test_dataloader():  # type: ignore[attr-defined]
        categories, labels = batch.category, batch.gt_label
        images, masks = batch.image.to(module.device), batch.gt_mask
        transform = module.pre_processor.transform
        with trainer.precision_plugin.forward_context():
            output = module.model(transform(images))
        size = output.anomaly_map.shape[-2:]
        masks = functional.interpolate(masks.reshape(len(masks), 1, *masks.shape[-2:]).float(), size, mode="nearest")
        metrics.update(categories, output.pred_score.float(), labels, output.anomaly_map.float(), masks[:, 0] > 0)
    module.train()
    return table_of(metrics)


def preload(datamodule: Any, size: int, num_workers: int) -> None:
    """Have a datamodule's images read once, and kept in memory, a GPU's if there is one, in the size of the models.

    Args:
        datamodule (Any): The datamodule; ``setup`` is called.
        size (int): Side of the square images in pixels.
        num_workers (int): Processes that read them.
    """
    datamodule.prepare_data()
    datamodule.setup()
    for name in ("train_data", "test_data"):
        setattr(datamodule, name, _InMemory(getattr(datamodule, name), size, num_workers))
    datamodule.setup = lambda *_, **__: None


class _InMemory(Dataset):
    """A dataset of images in memory."""

    def __init__(self, dataset: Any, size: int, num_workers: int) -> None:
        self.dataset = dataset
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loader = DataLoader(_Resized(dataset, size), batch_size=None, num_workers=num_workers)
        self.items = [replace(item, image=item.image.to(device)) for item in loader]

    def __getattr__(self, name: str) -> Any:
        if name in {"dataset", "items"}:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        # A copy, as a pre-processor may change an item.
        return replace(self.items[index])


class _Resized(Dataset):
    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset = dataset
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        image = functional.interpolate(item.image[None], self.size, mode="bilinear", antialias=True)[0]
        mask = item.gt_mask
        if mask is not None:
            mask = functional.interpolate(mask[None, None].float(), self.size, mode="nearest")[0, 0] > 0
        return replace(item, image=image, gt_mask=mask)
