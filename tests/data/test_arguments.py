"""Arguments of MultiCategory on anomalib's command line."""

import pytest
from anomalib.cli import AnomalibCLI

from anomalib_decad import MultiCategory
from conftest import make_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("products")
    make_dataset(root, ("01", "02"), num_train=1, num_test=1)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "categories"),
    [
        (["--data.datamodule", "BTech", "--data.categories", "[01,02]"], ["01", "02"]),
        (["--data.datamodule_args", '{"normal_dir": "train/good"}'], ["01", "02"]),
        (["--data.datamodule_args", "{normal_dir: train/good, abnormal_dir: [test/square]}"], ["01", "02"]),
        (["--data.datamodule_args.normal_dir", "train/good", "--data.bit_depth", "12"], ["01", "02"]),
    ],
)
def test_command_line(arguments, categories, root):
    model = ["--model", "DecAD", "--model.encoder", "test_vit", "--model.layers", "[1,2,3]"]
    data = ["--data", "MultiCategory", "--data.datamodule", "Folder", "--data.root", str(root)]
    datamodule = AnomalibCLI(["fit", *model, *data, *arguments], run=False).datamodule
    assert type(datamodule) is MultiCategory
    assert datamodule.categories == categories
    if "BTech" not in arguments:
        datamodule.setup()
        assert set(datamodule.train_data.samples.category) == set(categories)
    assert datamodule.bit_depth == (12 if "12" in arguments else None)
