import pytest
import torch

from anomalib_decad.components import fixed_point


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    weight = (0.8 * weight / torch.linalg.matrix_norm(weight, ord=2)).requires_grad_()
    bias = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    return weight, bias


def contraction(weight, bias):
    return lambda v: bias + torch.tanh(v @ weight.T)


def test_solution_is_a_fixed_point(problem):
    function = contraction(*problem)
    solution = fixed_point(function, torch.zeros(4, 6, dtype=torch.float64), 150)
    torch.testing.assert_close(solution, function(solution))


def test_implicit_gradient_is_that_of_a_long_unrolled_solve(problem):
    weight, bias = problem
    function = contraction(weight, bias)
    target = torch.randn(4, 6, dtype=torch.float64)

    unrolled = torch.zeros_like(target)
    for _ in range(200):
        unrolled = function(unrolled)
    expected = torch.autograd.grad((unrolled - target).square().sum(), [weight, bias])

    implicit = fixed_point(function, torch.zeros_like(target), 200)
    actual = torch.autograd.grad((implicit - target).square().sum(), [weight, bias])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_memory_does_not_grow_with_the_iterations(problem):
    function = contraction(*problem)

    def saved_bytes(iterations):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fixed_point(function, torch.zeros(4, 6, dtype=torch.float64), iterations)
        return total

    assert saved_bytes(2) == saved_bytes(50) > 0


def test_without_grad_no_graph_is_kept(problem):
    with torch.no_grad():
        assert not fixed_point(contraction(*problem), torch.zeros(4, 6, dtype=torch.float64), 3).requires_grad
