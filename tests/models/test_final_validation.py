import math

import pytest
from lightning.pytorch import Callback


class Validations(Callback):
    """Keeps the step of every validation."""

    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


# An epoch has three steps.
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 2}, [2]),
        ({"max_steps": 4, "check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 4]),
        ({"max_steps": 2, "check_val_every_n_epoch": None, "val_check_interval": 100}, [2]),
        ({"max_steps": 3}, [3]),
        ({"max_epochs": 2, "val_check_interval": 2}, [2, 5, 6]),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, [2]),
        ({"max_steps": 2, "limit_val_batches": 0}, []),
        ({"fast_dev_run": True}, [1]),
    ],
)
def test_a_validation_follows_the_last_step(make_engine, make_model, make_data, options, steps):
    validations = Validations()
    engine, model = make_engine(validations, **options), make_model()
    engine.fit(model, datamodule=make_data())
    # Lightning's own schedule, and once more at the end, where it has none there.
    assert validations.steps == steps
    assert math.isfinite(model.post_processor.image_threshold) == bool(steps)
    assert engine.trainer.check_val_every_n_epoch == options.get("check_val_every_n_epoch", 1)


def test_its_checkpoint_has_the_thresholds(make_engine, make_model, make_data):
    engine = make_engine(max_steps=2, check_val_every_n_epoch=None, val_check_interval=100)
    engine.fit(make_model(), datamodule=make_data())
    model = make_model()
    make_engine().validate(model, datamodule=make_data(), ckpt_path=engine.best_model_path)
    restored = type(model).load_from_checkpoint(engine.best_model_path)
    assert math.isfinite(restored.post_processor.image_threshold)
