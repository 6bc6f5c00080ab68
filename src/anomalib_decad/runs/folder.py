# SPDX-License-Identifier: Apache-2.0
"""The folder of a run."""

import re
from pathlib import Path
from typing import Any

from anomalib.engine import engine as engine_module
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_decad.compat import set_root_folder

__all__ = ["RunFolder"]

#: Folder of the runs of each kind, beside those of the trainings.
_KINDS = {TrainerFn.TESTING: "tests", TrainerFn.PREDICTING: "predictions"}


class RunFolder(Callback):
    """Gives each test and each prediction a folder of its own.

    anomalib's ``Engine`` writes them into the folder of the latest training, over what is there, whichever model they
    are of. Here they go to ``tests/v0``, ``tests/v1`` and so on beside it, and ``predictions/v0``. A test by the
    trainer that has trained the model stays in the folder of the training, as in ``anomalib train``.

    All processes of a distributed run use the folder of the first.
    """

    def __init__(self) -> None:
        # Of which trainer, and where its results were before a prediction had them elsewhere.
        self._home: tuple[int, str] | None = None
        self._has_trained = False

    def choose(self, trainer: Trainer, name: str) -> None:
        """Choose the folder, before any callback is set up: Lightning's own writes the arguments of the run there.

        Args:
            trainer (Trainer): The trainer; without ``Engine`` its folder is the user's choice and stays.
            name (str): Name of the model, which anomalib's folders have.
        """
        if self._home is None or self._home[0] != id(trainer):
            self._home, self._has_trained = (id(trainer), trainer.default_root_dir), False
        home = Path(self._home[1])
        set_root_folder(trainer, home)
        is_of_engine = re.fullmatch(r"latest|v\d+", home.name) and name in home.parts
        stage = trainer.state.fn
        if stage == TrainerFn.FITTING:
            self._has_trained = True
        stays = stage == TrainerFn.TESTING and self._has_trained
        # Other processes are told in setup.
        if is_of_engine and stage in _KINDS and not stays and trainer.is_global_zero:
            # Through the module: the command line watches which folders are made there.
            set_root_folder(trainer, engine_module.create_versioned_dir(home.parent / _KINDS[stage]))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have all processes use the folder of the first."""
        del pl_module, stage
        if trainer.world_size == 1:
            return
        mine = Path(trainer.default_root_dir)
        first = Path(trainer.strategy.broadcast(str(mine)))
        if first != mine:
            set_root_folder(trainer, first)
            if trainer.state.fn == TrainerFn.FITTING:
                self._home = id(trainer), str(first)
                _remove_version(mine)
        trainer.strategy.barrier("run folder")
        if trainer.is_global_zero:
            _point_latest_to(mine)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the trained model or the results of a test are, in the last line."""
        del pl_module
        if not trainer.is_global_zero:
            return
        if stage == "fit" and (model := getattr(trainer.checkpoint_callback, "best_model_path", "")):
            print(f"The trained model is in {model}")
        if stage == "test" and not self._has_trained:
            print(f"The results of the test are in {trainer.default_root_dir}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is of this process."""
        return {**vars(self), "_home": None, "_has_trained": False}


def _remove_version(folder: Path) -> None:
    """Remove the folder that anomalib has made for a process that is not the first, if it is empty."""
    if re.fullmatch(r"v\d+", folder.name) and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _point_latest_to(folder: Path) -> None:
    """Have anomalib's link name this version again, if it names one that is gone."""
    latest = folder.parent / "latest"
    if re.fullmatch(r"v\d+", folder.name) and latest.is_symlink() and not latest.exists():
        latest.unlink()
        latest.symlink_to(folder.name, target_is_directory=True)
