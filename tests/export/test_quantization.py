"""Which operations of a graph stay in floating point."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.deploy import CompressionType
from torch import nn

from anomalib_decad.export.quantization import quantize

openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")

pytestmark = pytest.mark.slow

DIM = 64
KINDS = [CompressionType.INT8, CompressionType.INT8_PTQ]


class Net(nn.Module):
    """An encoder, a part that needs its precision, and a decoder."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 8, 8)
        self.encoder = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.precise = nn.Linear(DIM, DIM)
        self.decoder = nn.Linear(DIM, DIM)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        rows = self.encoder(tokens).flatten(0, 1)
        return self.decoder(self.precise(rows))


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(Net().eval(), (torch.rand(1, 3, 32, 32),), str(path), dynamo=True, external_data=False)
    return lambda: openvino.convert_model(path)


class Images:
    """A datamodule of noise."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        images = [torch.rand(3, 32, 32, generator=generator) for _ in range(8)]
        self.train_data = [SimpleNamespace(image=image) for image in images]

    def setup(self, stage):
        assert stage == "fit"


def weights_in_floating_point(model):
    """Shapes of the weights that are neither compressed nor quantized."""
    found = 0
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "MatMul":
            source = operation.input_value(1).get_node()
            found += source.get_type_name() == "Constant" and source.get_element_type() == openvino.Type.f32
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[], ["precise"], ["precise", "decoder"]])
def test_declared_parts_stay_in_floating_point(graph, parts, kind):
    assert weights_in_floating_point(quantize(graph(), kind, parts, Images())) == len(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_outputs_resemble(graph, kind):
    image = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    expected = openvino.compile_model(graph(), "CPU", config)(image)[0]
    actual = openvino.compile_model(quantize(graph(), kind, ["precise"], Images()), "CPU", config)(image)[0]
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_the_graph_lacks_is_an_error(graph, kind):
    with pytest.raises(RuntimeError, match="no weight of ecise, renamed, which must stay in floating point"):
        quantize(graph(), kind, ["precise", "ecise", "renamed"], Images())
