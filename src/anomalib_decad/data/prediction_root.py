# SPDX-License-Identifier: Apache-2.0
"""Where the images of a prediction are."""

import os
from pathlib import Path

from lightning.pytorch import Trainer

__all__ = ["PredictionRoot", "plain"]


class PredictionRoot:
    """Finds what is above the folders of images to predict; equally named ones in there must stay apart.

    It is found once for all images of a prediction.
    """

    def __init__(self) -> None:
        self._root: tuple[int, Path] | None = None

    def below(self, trainer: Trainer, path: str) -> Path | None:
        """Find where an image is below that folder.

        Args:
            trainer (Trainer): The trainer.
            path (str): Path of an image.

        Returns:
            Path | None: Its path from there, which leads nowhere up; ``None`` if the trainer does not predict a folder,
                or the image is not in it.
        """
        if not trainer.predicting or not path:
            return None
        loaders = trainer.predict_dataloaders
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        datasets = [
            loader.dataset for loader in loaders if hasattr(getattr(loader, "dataset", None), "image_filenames")
        ]
        names = [dataset.image_filenames for dataset in datasets if dataset.image_filenames]
        if not names:
            return None
        key = hash(tuple((len(files), str(files[0])) for files in names))
        if self._root is None or self._root[0] != key:
            folders = {plain(name).parent for list_of_files in names for name in list_of_files}
            self._root = key, Path(os.path.commonpath(folders)).parent
        root, found = self._root[1], plain(path)
        return found.relative_to(root) if found.is_relative_to(root) else None


def plain(path: str | Path) -> Path:
    """Make a path absolute, without any ``..``: what is written below a folder stays in it."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Links are not followed, as by resolve().
