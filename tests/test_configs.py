from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD

from anomalib_decad import DecAD, MultiCategory

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
CATEGORIES = {"mvtecad": 15, "visa": 12, "realiad": 30, "one_class": 1}


def test_there_is_one_for_each_dataset():
    assert {path.stem.removeprefix("decad_") for path in CONFIGS} == set(CATEGORIES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_parsed_by_the_command_line(path):
    cli = AnomalibCLI(["fit", "--config", str(path), "--trainer.accelerator", "cpu"], run=False)
    assert type(cli.model) is DecAD
    assert cli.model.hparams.encoder == "vit_base_patch14_dinov2"
    assert tuple(cli.model.input_size) == (280, 280)
    assert cli.engine._cache.args["max_steps"] == 15_000
    assert cli.datamodule.train_batch_size == 16
    number = CATEGORIES[path.stem.removeprefix("decad_")]
    if number == 1:
        assert type(cli.datamodule) is MVTecAD
    else:
        assert type(cli.datamodule) is MultiCategory
        assert len(cli.datamodule.categories) == number
