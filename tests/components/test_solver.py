import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from anomalib_decad.components import LipschitzDenseNet, fixed_point
from anomalib_decad.components.invertible.dense_net import dense
from anomalib_decad.components.invertible.fused import FusedUnit


def make_problem(hidden_dim=4, growth=3, depth=2, rows=5, lipschitz=0.9, seed=0):
    """Give s, U and the layers of a unit whose gain is large, in float64."""
    torch.manual_seed(seed)
    net = LipschitzDenseNet(9, hidden_dim, growth, depth, lipschitz).double()
    with torch.no_grad():
        net.gain.fill_(3.0)
    for _ in range(30):
        net(torch.zeros(1, 9, dtype=torch.float64))  # power iterations
    with torch.no_grad():
        unit = FusedUnit.from_dense_net(net.eval().fused(), lipschitz, preconditioned=False)
    start = torch.randn(rows, hidden_dim, dtype=torch.float64)
    tensors = [start, unit.update_weight, *(tensor for layer in unit.layers for tensor in layer)]
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def solve(start, update_weight, *parameters, iterations):
    return fixed_point(start, update_weight, list(zip(parameters[::2], parameters[1::2], strict=True)), iterations)


def unrolled(start, update_weight, *parameters, iterations):
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    v = start
    for _ in range(iterations):
        v = start - functional.linear(dense(v, layers), update_weight)
    return dense(v, layers)


@settings(max_examples=15, deadline=None)
@given(
    hidden_dim=st.integers(1, 5), growth=st.integers(1, 4), depth=st.integers(1, 3), seed=st.integers(0, 99),
    lipschitz=st.floats(0.1, 0.95),
)  # fmt: skip
def test_solution_is_a_fixed_point(hidden_dim, growth, depth, seed, lipschitz):
    problem = make_problem(hidden_dim, growth, depth, lipschitz=lipschitz, seed=seed)
    with torch.no_grad():
        features = solve(*problem, iterations=300)
    v = features[:, :hidden_dim]
    start, update_weight, *parameters = problem
    torch.testing.assert_close(v, start - functional.linear(features, update_weight))
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    torch.testing.assert_close(features, dense(v, layers))


@settings(max_examples=10, deadline=None)
@given(hidden_dim=st.integers(1, 5), growth=st.integers(1, 4), depth=st.integers(1, 3), seed=st.integers(0, 99))
def test_implicit_gradient_is_that_of_a_long_unrolled_solve(hidden_dim, growth, depth, seed):
    problem = make_problem(hidden_dim, growth, depth, seed=seed)
    features = unrolled(*problem, iterations=300)
    weight = torch.randn_like(features)
    expected = torch.autograd.grad((features * weight).sum(), problem)
    actual = torch.autograd.grad((solve(*problem, iterations=300) * weight).sum(), problem)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_gradients_in_float64():
    assert torch.autograd.gradcheck(lambda *problem: solve(*problem, iterations=300), make_problem())


def test_weights_without_a_gradient_are_no_work_and_no_error():
    start, *others = make_problem()
    others = [tensor.detach() for tensor in others]
    (gradient,) = torch.autograd.grad(solve(start, *others, iterations=50).sum(), start)
    assert torch.isfinite(gradient).all()


def test_memory_does_not_grow_with_the_iterations():
    problem = make_problem()

    def saved_bytes(iterations):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            solve(*problem, iterations=iterations)
        return total

    assert saved_bytes(2) == saved_bytes(50) > 0


def test_without_grad_no_graph_is_kept():
    with torch.no_grad():
        assert not solve(*make_problem(), iterations=3).requires_grad


def test_second_derivative_is_refused():
    start, *others = make_problem()
    (gradient,) = torch.autograd.grad(solve(start, *others, iterations=9).square().sum(), start, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
