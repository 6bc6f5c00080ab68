"""What can differ on a device: run on the CPU, and on a GPU where there is one."""

import copy

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch import seed_everything
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anomalib_decad.components import Decoupler, DecouplerOptions, InvertibleNetwork, InvertibleOptions
from anomalib_decad.components.invertible import FrozenNetwork
from anomalib_decad.components.patch_sampling import PatchSample, choose_patches, sample_patches
from anomalib_decad.metrics import CategoryMetrics
from conftest import IMAGE_SIZE, losses_of

HAS_CUDA = torch.cuda.is_available()
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
ACCELERATOR = {"cpu": "cpu", "cuda": "gpu"}
SIZE = (IMAGE_SIZE, IMAGE_SIZE)


@pytest.fixture
def model(make_model):
    """A model that was initialized, with the start of a training that moved it."""
    model = make_model()
    net = model.model.train()
    net.initialize(sample_patches([net.encoder(torch.randn(8, 3, *SIZE))], 8, 128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@devices
def test_all_tensors_are_on_the_device_and_scores_are_those_of_the_cpu(device, model, images):
    with torch.inference_mode():
        expected = model.model(images)
        net = copy.deepcopy(model.model).to(device)
        for candidate in (net, net.fused(SIZE)):
            assert {tensor.device.type for tensor in (*candidate.parameters(), *candidate.buffers())} == {device}
            output = candidate(images.to(device))
            torch.testing.assert_close(output.pred_score.cpu(), expected.pred_score, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(output.anomaly_map.cpu(), expected.anomaly_map, atol=1e-3, rtol=1e-3)


@devices
def test_patches_are_chosen_on_the_device(device):
    embeddings = torch.randn(2, 50, 8, device=device)
    random_state = torch.get_rng_state()
    chosen = choose_patches(embeddings, 10)
    assert chosen.device.type == device
    assert device == "cpu" or torch.equal(torch.get_rng_state(), random_state)


@devices
@pytest.mark.parametrize("decouple", [True, False])
def test_a_training_step_makes_all_its_tensors_on_the_device(device, decouple, make_model, images):
    net = make_model(decouple=decouple).model.to(device).train()
    features = net.encoder(images.to(device))
    net.initialize(PatchSample(features, net.recognizer.describe(features)))
    random_state = torch.get_rng_state()
    output = net.training_output(features)
    tensors = [*output.features, *output.reconstructions, *(value for value in output[2:] if value is not None)]
    assert {tensor.device.type for tensor in tensors} == {device}
    # Random numbers of a training on a device come from its generator, which checkpoints keep.
    if device != "cpu" and decouple:
        assert torch.equal(torch.get_rng_state(), random_state)
    sum(tensor.square().mean() for tensor in output.reconstructions).backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert gradients
    assert {gradient.device.type for gradient in gradients} == {device}


PRECISIONS = [("cpu", "32-true", "off"), ("cpu", "bf16-mixed", "ram"), ("cpu", "bf16-mixed", "device")]
PRECISIONS += [
    pytest.param("cuda", precision, cache, marks=needs_cuda)
    for precision in ("32-true", "bf16-mixed", "16-mixed")
    for cache in ("off", "ram", "device")
]


@pytest.mark.slow
@pytest.mark.parametrize(("device", "precision", "feature_cache"), PRECISIONS)
def test_precisions_and_caches_train(device, precision, feature_cache, make_model, make_data, make_engine):
    losses = losses_of(
        make_engine, make_model(feature_cache=feature_cache), make_data(), limit_val_batches=0, max_steps=8,
        accelerator=ACCELERATOR[device], precision=precision,
    )  # fmt: skip
    assert np.isfinite(losses).all()
    assert len(losses) == 8


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_resuming_on_a_device_gives_the_losses_of_an_unbroken_run(device, make_model, make_data, make_engine, tmp_path):
    options = {"feature_cache": "device"}
    trainer = {"max_epochs": 3, "accelerator": ACCELERATOR[device], "limit_val_batches": 0}
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    seed_everything(7)
    unbroken = losses_of(make_engine, make_model(**options), make_data(), saver, **trainer)
    resumed = losses_of(
        make_engine, make_model(**options), make_data(), seed=99, ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt",
        **trainer,
    )  # fmt: skip
    # Sums of a GPU are in no fixed order.
    assert resumed == pytest.approx(unbroken[3:], rel=1e-6 if device == "cpu" else 2e-3)


class NoFloat64(TorchDispatchMode):
    """Notes what makes a float64 tensor."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_steps_and_inference_are_free_of_float64(decouple, precision, make_model, images):
    """Apple's and Intel's GPUs do not have it; what the preparation needs it for is on the CPU."""
    model = make_model(decouple=decouple)
    net = model.model.train()
    features = net.encoder(images)
    net.initialize(PatchSample(features, net.recognizer.describe(features)))
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    with NoFloat64() as seen:
        with autocast:
            loss = model.loss(net.training_output(features))["loss"]
        loss.backward()
        fused = net.eval().fused(SIZE)
        with autocast, torch.inference_mode():
            fused(images)
    assert not seen.found
    with NoFloat64() as seen:
        torch.zeros(2).double()
    assert seen.found


@pytest.mark.slow
@devices
def test_inference_compiles_without_a_graph_break(device, model, images):
    net = model.model.to(device).fused(SIZE)
    compiled = torch.compile(net, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.inference_mode():
        expected, actual = net(images.to(device)), compiled(images.to(device))
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(actual.pred_score, expected.pred_score, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@devices
def test_training_compiles_without_a_graph_break_in_the_solver(device):
    options = InvertibleOptions(num_blocks=1, num_units=2, hidden_dim=8)
    decoupler = Decoupler(16, DecouplerOptions(0.5, 0), options).to(device).train()
    x = torch.randn(2, 50, 16, device=device)
    decoupler.initialize(x)
    other = copy.deepcopy(decoupler)
    compiled = torch.compile(other, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    gradients = []
    for module, function in ((decoupler, decoupler), (other, compiled)):
        output = function(x)
        (output.x_clean.square().mean() + output.energy.mean()).backward()
        gradients.append([parameter.grad for parameter in module.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@devices
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_round_trip_holds_whatever_matrix_products_are_rounded_to(device, matmul):
    """TensorFloat-32 has ten bits: weights are folded and applied in full float32."""
    network = InvertibleNetwork(64, InvertibleOptions()).to(device).eval()
    x = torch.randn(256, 64, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with torch.no_grad():
            frozen = FrozenNetwork(network.fold(converged=True))
            error = max((net.inverse(net(x)) - x).abs().max().item() for net in (network, frozen))
    finally:
        torch.set_float32_matmul_precision(before)
    # TensorFloat-32 keeps three digits of what a unit changes.
    assert error < (1e-4 if matmul == "highest" or device == "cpu" else 1e-2)


@devices
def test_metrics_are_those_of_the_cpu(device):
    scores, labels, maps = torch.rand(6), torch.arange(6) % 3 == 0, torch.rand(6, 8, 8)
    masks = (torch.rand(6, 8, 8) < 0.5) & labels[:, None, None]
    tables = []
    for target in ("cpu", device):
        metrics = CategoryMetrics()
        metrics.update(["a", "b"] * 3, scores.to(target), labels.to(target), maps.to(target), masks.to(target))
        tables.append(metrics.compute())
    assert set(tables[0]) == {"a", "b", "mean"}
    for name, row in tables[0].items():
        assert tables[1][name] == pytest.approx(row, rel=1e-6, nan_ok=True)


@pytest.mark.gpu
def test_onnxruntime_on_cuda_gives_the_scores_of_torch(model, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    path = model.to_onnx(tmp_path, input_size=SIZE)
    session = onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    with torch.inference_mode():
        expected = model(images.clone())
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    np.testing.assert_allclose(values["pred_score"].ravel(), expected.pred_score.ravel(), atol=2e-3)
