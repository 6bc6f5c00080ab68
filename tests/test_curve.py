"""Scores on the way of a race."""

import json

import pytest
from lightning.pytorch import Callback, seed_everything

from conftest import BENCHMARKS


class CutOff(Callback):
    """Ends a training behind a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lost", [False, True])
def test_a_race_that_was_cut_off_goes_on_from_its_last_point(
    lost, make_engine, make_model, make_data, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from curve import Curve

    def run(folder, *callbacks):
        seed_everything(7)
        curve = Curve(folder, 2)
        options = {"max_steps": 4, "limit_val_batches": 0}
        make_engine(curve, *callbacks, **options).fit(make_model(), datamodule=make_data(), ckpt_path=curve.resume_from)
        return curve

    unbroken = run(tmp_path / "unbroken").points
    assert [point["step"] for point in unbroken] == [2, 4]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "cut", CutOff(3))
    if lost:  # killed between the checkpoint and the file
        (tmp_path / "cut" / "curve.jsonl").unlink()
    resumed = run(tmp_path / "cut")
    assert resumed.points == [json.loads(line) for line in resumed.file.read_text().splitlines()]
    assert [point["metrics"] for point in resumed.points] == [point["metrics"] for point in unbroken]
    assert 0 < resumed.points[0]["training_seconds"] < resumed.points[1]["training_seconds"]
    # What is complete stays as it is.
    assert run(tmp_path / "cut").points == resumed.points
