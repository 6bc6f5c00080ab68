# SPDX-License-Identifier: Apache-2.0
"""What Lightning shows on the terminal while one of the package's models runs."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich import get_console
from rich.table import Table

from anomalib_decad.compat import count_epochs_from_one
from anomalib_decad.metrics import CategoryEvaluator
from anomalib_decad.quiet import is_verbose, quieten_handlers, quieten_trained

__all__ = ["tidy_display"]

#: What the summary of a model tells of each part.
_COLUMNS = ("Name", "Type", "Params", "Mode")


def tidy_display(trainer: Trainer, stage: str, evaluator: Any) -> None:
    """Have Lightning count epochs from 1, and leave out what says nothing or is said twice.

    Only the trainer of this run changes, and nothing does if the user wants all messages.

    Args:
        trainer (Trainer): The trainer.
        stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        evaluator (Any): The model's evaluator.
    """
    if is_verbose():
        return
    quieten_handlers()
    if stage == "fit":
        quieten_trained()
        count_epochs_from_one(trainer.progress_bar_callback)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback) is RichModelSummary:
                callback.summarize = _summarize  # type: ignore[method-assign]
    elif stage == "test" and isinstance(evaluator, CategoryEvaluator):
        # The evaluator prints a table of its own, of the same numbers.
        trainer.test_loop.verbose = False


def _summarize(
    summary_data: list[tuple[str, list[str]]],
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Print Lightning's summary without operations, which nobody has counted, and modes that are so on purpose."""
    del args, kwargs
    columns = dict(summary_data)
    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name == "Params" else "left")
    for row in zip(*(columns.get(name, []) for name in _COLUMNS), strict=True):
        table.add_row(*row)
    console = get_console()
    console.print(table)
    trainable, total = (get_human_readable_count(int(count)) for count in (trainable_parameters, total_parameters))
    console.print(f"{total} parameters ({model_size:.1f} MB), of which {trainable} are trained")
