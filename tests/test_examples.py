"""The examples of inference read images as a training does."""

import importlib.util

import cv2
import numpy as np
import pytest

from conftest import ROOT


def write(path, values):
    assert cv2.imwrite(str(path), values)
    return path


@pytest.mark.parametrize("script", ["onnx_inference", "openvino_inference"])
@pytest.mark.parametrize("bits", [None, 12])
def test_images_of_high_bit_depth_are_scaled(script, bits, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    batches = []

    def predict(batch):
        batches.append(batch)
        return {"pred_score": np.zeros((1, 1)), "pred_label": np.zeros((1, 1)), "anomaly_map": batch[:, :1],
                "pred_mask": np.zeros((1, 1, 8, 8))}  # fmt: skip

    monkeypatch.setattr(example, "load", lambda *_: predict)
    shades = np.linspace(0, 1, 64).reshape(8, 8)
    paths = [write(tmp_path / "a.png", (shades * 255).astype(np.uint8)),
             write(tmp_path / "b.png", (shades * 4095).astype(np.uint16)),
             write(tmp_path / "dark.png", (shades * 819).astype(np.uint16))]  # fmt: skip
    given = [*map(str, paths), "--output", str(tmp_path / "out"), *(["--bits", str(bits)] if bits else [])]
    monkeypatch.setattr("sys.argv", [script, "model", *given])
    example.main()
    for batch, scale in zip(batches, (1, 1, 0.2), strict=True):
        assert batch.dtype == np.float32
        assert np.allclose(batch, shades * scale, atol=1 / 255)
    assert len(list((tmp_path / "out").iterdir())) == 3
