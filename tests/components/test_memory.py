import pytest
import torch

from anomalib_decad.components import PrototypeMemory


@pytest.fixture
def clusters():
    """Three well separated clusters of 60 patches."""
    centers = 10 * torch.eye(3, 8)
    return centers, (centers[:, None] + 0.1 * torch.randn(3, 60, 8)).flatten(0, 1)


def test_normal_embeddings_are_remembered_and_others_are_not(clusters):
    centers, x = clusters
    memory = PrototypeMemory(8, 24)
    memory.initialize(x)
    assert (memory(x) - x).norm(dim=-1).max() < 1.5
    anomaly = centers + 5 * torch.eye(8)[5]
    assert (memory(anomaly) - anomaly).norm(dim=-1).min() > 4


def test_what_is_remembered_lies_between_the_prototypes(clusters):
    memory = PrototypeMemory(8, 24)
    memory.initialize(clusters[1])
    output = memory(100 * torch.randn(50, 8))
    assert (output <= memory.values.max(1).values + 1e-4).all()
    assert (output >= memory.values.min(1).values - 1e-4).all()


def test_weights_are_those_of_squared_distances():
    memory = PrototypeMemory(4, 5).double()
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    weights = (-memory.log_beta.exp() * torch.cdist(x, memory.keys).square()).softmax(-1)
    torch.testing.assert_close(memory(x), weights @ memory.values.T)


def test_gradients():
    memory = PrototypeMemory(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory, x)


def test_more_prototypes_than_patches_is_no_error():
    memory = PrototypeMemory(4, 50)
    memory.initialize(torch.randn(6, 4))
    assert torch.isfinite(memory(torch.randn(3, 4))).all()


def test_distances_are_as_exact_under_mixed_precision():
    memory = PrototypeMemory(8, 20)
    x = torch.randn(2, 9, 8) + 20  # far from 0, bfloat16 has no digits left for the distances
    memory.initialize(x.flatten(0, 1))
    distances = torch.cdist(x.double(), memory.keys.double()).square()
    expected = ((-memory.log_beta.exp() * distances).softmax(-1) @ memory.values.T.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(memory(x).float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("arguments", [{"num_prototypes": 0}, {"sharpness": 0.0}])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PrototypeMemory(4, **arguments)
