"""Arguments of MultiCategory on anomalib's command line."""

import pytest
from anomalib.cli import AnomalibCLI

from anomalib_decad import MultiCategory
from conftest import make_dataset


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.datamodule_args", '{"normal_dir": "train/good"}'],
        ["--data.datamodule_args", "{normal_dir: train/good, abnormal_dir: [test/square]}"],
        ["--data.datamodule_args.normal_dir", "train/good", "--data.categories", "[01,02]", "--data.bit_depth", "12"],
    ],
)
def test_command_line(arguments, tmp_path):
    make_dataset(tmp_path, ("01", "02"), num_train=1, num_test=1)
    model = ["--model", "DecAD", "--model.encoder", "test_vit", "--model.layers", "[1,2,3]"]
    data = ["--data", "MultiCategory", "--data.datamodule", "Folder", "--data.root", str(tmp_path)]
    datamodule = AnomalibCLI(["fit", *model, *data, *arguments], run=False).datamodule
    assert type(datamodule) is MultiCategory
    datamodule.setup()
    assert set(datamodule.train_data.samples.category) == {"01", "02"}
    assert datamodule.bit_depth == (12 if "12" in arguments else None)
