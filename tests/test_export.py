import pickle

import pytest
import torch
from torch.nn.utils import parametrize

from anomalib_decad import DecAD
from anomalib_decad.components import InvertibleNetwork
from anomalib_decad.components.invertible import remove_spectral_norms


def test_plain_weights_compute_the_same_and_can_be_pickled():
    network = InvertibleNetwork(16, hidden_dim=8).train()
    x = torch.randn(20, 16)
    network(x)
    network.eval()
    with torch.no_grad():
        expected = network.inverse(network(x))
        remove_spectral_norms(network)
        torch.testing.assert_close(network.inverse(network(x)), expected)
    assert not any(parametrize.is_parametrized(module) for module in network.modules())
    pickle.dumps(network)


@pytest.fixture
def trained_model(encoder_weights):
    model = DecAD(
        encoder="test_vit",
        encoder_weights=encoder_weights,
        blocks=[1, 2],
        image_size=(48, 48),
        hidden_dim=8,
        num_blocks=1,
    )
    model.train()
    model.model(torch.rand(4, 3, 48, 48))
    return model.eval()


def test_torch_export_predicts_as_the_model_and_leaves_it_trainable(trained_model, tmp_path):
    path = trained_model.to_torch(tmp_path)
    exported = torch.load(path, weights_only=False)["model"].eval()
    images = torch.rand(2, 3, 60, 60)
    with torch.no_grad():
        for a, b in zip(exported(images), trained_model(images), strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any(parametrize.is_parametrized(module) for module in trained_model.model.modules())


def test_onnx_export_predicts_as_the_model(trained_model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = trained_model.to_onnx(tmp_path, input_size=(48, 48))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, 48, 48)
    outputs = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {"input": images.numpy()}), strict=True)
    )
    with torch.no_grad():
        expected = trained_model(images)
    torch.testing.assert_close(torch.from_numpy(outputs["anomaly_map"]), expected.anomaly_map, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(outputs["pred_score"]), expected.pred_score, rtol=1e-4, atol=1e-5)
