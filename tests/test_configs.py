from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD

from anomalib_decad import DecAD, DecoupledMambaAD, DecoupledReverseDistillation, DecoupledUniAD, MultiCategory

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("decad_*.yaml"))
CATEGORIES = {"mvtecad": 15, "visa": 12, "realiad": 30, "one_class": 1}


def test_there_is_one_for_each_dataset():
    assert {path.stem.removeprefix("decad_") for path in CONFIGS} == set(CATEGORIES)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DecoupledReverseDistillation, DecoupledUniAD, DecoupledMambaAD])
def test_decoupled_models_have_one_each(cls):
    configs = [path for path in FOLDER.glob("decoupled_*.yaml") if cls.__name__ in path.read_text()]
    assert len(configs) == 1
    cli = AnomalibCLI(["fit", "--config", str(configs[0]), "--trainer.accelerator", "cpu"], run=False)
    assert type(cli.model) is cls
    assert cli.model.model.decoupling is not None
    assert type(cli.datamodule) is MultiCategory
