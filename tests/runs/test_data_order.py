import signal
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything
from test_last_state import Signal

from conftest import losses_of


# An epoch has three steps, and there is no validation before the end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "data"),
    [
        (1, {"sampling": "natural"}),
        (2, {}),
        (3, {}),
        (4, {"num_workers": 1}),
        (5, {"sampling": "natural", "num_workers": 1}),
        (8, {}),
    ],
)
def test_a_training_resumed_within_an_epoch_is_an_unbroken_one(step, data, make_engine, make_model, make_data):
    options = {"max_steps": 9, "check_val_every_n_epoch": None, "val_check_interval": 9}
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(), make_data(**data), **options)
    engine = make_engine(Signal(signal.SIGTERM, step), **options)
    seed_everything(7)
    model = make_model()
    seed_everything(7)
    with pytest.raises(SystemExit):
        engine.fit(model, datamodule=make_data(**data))
    path = Path(engine.trainer.default_root_dir) / "weights" / "last.ckpt"
    resumed = losses_of(make_engine, make_model(), make_data(**data), seed=8, ckpt_path=path, **options)
    assert resumed == pytest.approx(unbroken[step:], rel=1e-6)
