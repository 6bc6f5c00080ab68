import copy
import io
import pickle

import pytest
import torch
from scipy.optimize import root
from torch import nn
from torch.nn.utils import parametrize

from anomalib_decad.components import InvertibleNetwork, InvertibleOptions, LipschitzDenseNet, MonotoneUnit
from anomalib_decad.components.invertible import ActNorm, SolverIterations


@pytest.fixture(autouse=True, scope="module")
def _strong_units():
    """Units that bend as much as they may: near the identity, where training starts, nothing is hard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomalib_decad.components.invertible.dense_net._GAIN", 0.9999)
        yield


def make_network(dim, dtype=torch.float32, iterations=None, **kwargs):
    options = {} if iterations is None else {"iterations": SolverIterations(iterations, iterations, iterations)}
    network = InvertibleNetwork(dim, InvertibleOptions(**kwargs), **options).to(dtype)
    network.train()
    network.initialize(torch.randn(256, dim, dtype=dtype))
    return network


def train(network, steps=60, lr=1e-2):
    """Train hard towards a split latent, as the decoupler is trained, to leave the benign initialization."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    network.train()
    mixing = torch.randn(network.dim, network.dim) / network.dim**0.5
    for _ in range(steps):
        x = torch.randn(128, network.dim) @ mixing.tanh()
        z = network(x)
        half = network.dim // 2
        loss = z[:, :half].square().mean() - z[:, half:].abs().clamp(max=3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dim", [8, 33, 384, 768])
@pytest.mark.parametrize("trained", [False, True])
def test_round_trips_in_float32(dim, trained):
    network = make_network(dim)
    if trained:
        train(network, steps=60 if dim < 100 else 15)
    network.eval()
    x = torch.randn(3, 50, dim)
    with torch.no_grad():
        assert relative_error(network.inverse(network(x)), x) <= 1e-4
        assert relative_error(network(network.inverse(x)), x) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_round_trips_in_float64_with_more_iterations(trained):
    network = make_network(32, iterations=None)
    if trained:
        train(network)
    network = network.double()
    for module in network.modules():
        if isinstance(module, MonotoneUnit):
            module.iterations = SolverIterations(300, 300, 300)
    network.eval()
    x = torch.randn(100, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(network.inverse(network(x)), x) <= 1e-10
        assert relative_error(network(network.inverse(x)), x) <= 1e-10


def test_iterations_follow_from_the_weights_and_are_restored_with_them():
    network = train(make_network(33)).eval()
    iterations = [unit._evaluation_iterations for unit in network.modules() if isinstance(unit, MonotoneUnit)]
    assert all(2 <= number <= 64 for number in iterations)
    assert len(set(iterations)) > 1
    restored = InvertibleNetwork(33).eval()
    restored.load_state_dict(network.state_dict())
    assert [u._evaluation_iterations for u in restored.modules() if isinstance(u, MonotoneUnit)] == iterations


def largest_singular_value(function, point):
    return torch.linalg.matrix_norm(torch.autograd.functional.jacobian(function, point), ord=2).item()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 64])
def test_lipschitz_constant_of_g_stays_below_one(dim):
    network = make_network(dim)
    for phase in range(3):
        for module in network.modules():
            if isinstance(module, LipschitzDenseNet):
                for scale in (0.1, 1.0, 10.0):
                    assert largest_singular_value(module.eval(), scale * torch.randn(dim)) < 1, phase
        train(network, steps=40, lr=3e-2)


@pytest.mark.parametrize("rev", [False, True])
def test_unit_is_its_definition(rev):
    dim = 10
    unit = MonotoneUnit([(dim,)], hidden_dim=6, iterations=SolverIterations(300, 300, 300)).double().eval()
    sign = -1 if rev else 1
    x = torch.randn(dim, dtype=torch.float64)

    def residual(u):
        u = torch.from_numpy(u)
        return ((u + sign * unit.net(u)) / 2 - x).detach().numpy()

    solution = root(residual, x.numpy(), tol=1e-12)
    assert solution.success
    (output,), _ = unit([x[None]], rev=rev, jac=False)
    torch.testing.assert_close(output[0].detach(), torch.from_numpy(solution.x) - x, rtol=1e-8, atol=1e-9)


def test_inverse_is_the_unit_of_minus_g():
    unit = MonotoneUnit([(10,)], iterations=SolverIterations(300, 300, 300)).double().eval()
    negative = copy.deepcopy(unit)
    negative.net.lipschitz = -unit.net.lipschitz
    x = torch.randn(20, 10, dtype=torch.float64)
    (inverse,), _ = unit([x], rev=True, jac=False)
    (forward,), _ = negative([x], rev=False, jac=False)
    torch.testing.assert_close(inverse, forward)
    (back,), _ = unit([inverse], jac=False)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("rev", [False, True])
def test_log_determinant_is_that_of_the_jacobian(rev):
    unit = MonotoneUnit([(7,)], hidden_dim=5, iterations=SolverIterations(200, 200, 200)).double().eval()
    x = torch.randn(4, 7, dtype=torch.float64)
    _, log_det = unit([x], rev=rev, jac=True)
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: unit([r[None]], rev=rev, jac=False)[0][0][0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], value, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("rev", [False, True])
def test_gradcheck_of_the_unit(rev):
    unit = MonotoneUnit([(5,)], hidden_dim=4, growth=3, iterations=SolverIterations(200, 200, 200)).double().eval()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = list(unit.parameters())

    def function(x, *_):
        return unit([x], rev=rev, jac=False)[0][0]

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("dim", [8, 384])
def test_frozen_network_computes_the_same_without_parametrizations(dim):
    network = train(make_network(dim), steps=20).train()
    frozen = network.fused()
    assert network.training
    network.eval()
    x = torch.randn(2, 30, dim)
    with torch.no_grad():
        z = network(x)
        torch.testing.assert_close(frozen(x), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(frozen.inverse(z), network.inverse(z), rtol=1e-5, atol=1e-5)
    assert not any(parametrize.is_parametrized(module) for module in frozen.modules())
    assert not list(frozen.parameters())
    restored = pickle.loads(pickle.dumps(frozen))
    torch.testing.assert_close(restored(x), frozen(x))


@pytest.mark.slow
def test_preconditioning_does_not_change_the_solution_and_saves_iterations():
    network = train(make_network(33)).double().eval()
    x = torch.randn(20, 33, dtype=torch.float64)
    for unit in (module for module in network.modules() if isinstance(module, MonotoneUnit)):
        for rev in (False, True):
            plain, fast = (unit._fused(rev, preconditioned) for preconditioned in (False, True))
            with torch.no_grad():
                torch.testing.assert_close(fast.solve(x, 100), plain.solve(x, 200), rtol=1e-9, atol=1e-10)
        assert unit._needed_iterations(True) <= 0.7 * unit._needed_iterations(False) + 1


def test_the_plain_iteration_is_taken_where_preconditioning_is_worse():
    unit = MonotoneUnit([(8,)], hidden_dim=8, growth=8, depth=1, lipschitz=0.8).train()
    (layer,) = unit.net.dense
    with torch.no_grad():
        # G = 0.8 Pila, with its slopes between -0.28 and 0.8.
        layer.concatenation.copy_(torch.tensor([-20.0, 20.0]))
        for linear in (unit.net.encode, layer.linear):
            linear.parametrizations.weight.original.copy_(torch.eye(8))
            linear.bias.zero_()
        unit.net.decode.parametrizations.weight.original.copy_(torch.cat([torch.zeros(8, 8), torch.eye(8)], dim=1))
        for _ in range(50):  # power iterations
            unit.net.fused()
    unit.eval()
    assert unit._needed_iterations(True) > unit._needed_iterations(False)
    assert not unit._preconditioned
    x = torch.randn(50, 8)
    with torch.no_grad():
        (z,), _ = unit([x], jac=False)
        (back,), _ = unit([z], rev=True, jac=False)
    assert relative_error(back, x) <= 1e-4


def test_every_parameter_gets_a_gradient_also_with_cached_weights():
    network = make_network(16, hidden_dim=8)
    x = torch.randn(10, 16)
    (network.inverse(network(x) * 0.5) - x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_rows_do_not_depend_on_each_other():
    network = make_network(16).eval()
    x = torch.randn(2, 9, 16)
    changed = x.clone()
    changed[0, 3] += 5
    with torch.no_grad():
        different = (network(x) != network(changed)).any(-1)
    assert different.nonzero().tolist() == [[0, 3]]


def _outputs_and_gradients(network, x):
    network.zero_grad()
    z = network(x)
    back = network.inverse(z)
    (z[:, : network.dim // 2].square().mean() + back.square().mean()).backward()
    return z.detach(), back.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


def test_training_in_bfloat16_is_training_in_float32_within_rounding():
    network = train(make_network(64), steps=15)
    x = torch.randn(200, 64)
    expected = _outputs_and_gradients(network, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = _outputs_and_gradients(network, x)
    for actual, exact in zip(rounded, expected, strict=True):
        assert actual.dtype == torch.float32
        assert 0 < relative_error(actual, exact) < 2e-2


@pytest.mark.parametrize(("mode", "dtype"), [(False, torch.bfloat16), (False, torch.float16), (True, torch.float16)])
def test_precision_is_kept_in_eval_mode_and_where_numbers_could_overflow(mode, dtype):
    network = make_network(16).train(mode)
    x = torch.randn(9, 16)
    with parametrize.cached():  # in training mode each pass refines the spectral norms
        expected = network(x)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)


def test_half_precision_input_is_computed_in_float32():
    network = make_network(16).eval()
    x = torch.randn(9, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z = network(x.bfloat16())
        assert z.dtype == torch.float32
        torch.testing.assert_close(network.inverse(z), x.bfloat16().float(), rtol=1e-4, atol=1e-4)


class TestActNorm:
    def test_first_training_batch_gets_mean_zero_and_variance_one(self):
        norm = ActNorm([(6,)]).train()
        x = torch.randn(500, 6) * torch.tensor([0.8, 1.0, 1.2, 2.0, 5.0, 9.0]) + 3
        (y,), _ = norm([x])
        torch.testing.assert_close(y.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.std(0, correction=0), torch.ones(6), rtol=1e-4, atol=0)
        (again,), _ = norm([x * 2])
        torch.testing.assert_close(again.std(0, correction=0), 2 * torch.ones(6), rtol=1e-4, atol=0)

    def test_evaluation_and_inverse_do_not_initialize(self):
        norm = ActNorm([(6,)])
        x = torch.randn(50, 6) + 3
        (y,), _ = norm.eval()([x])
        torch.testing.assert_close(y, x)
        (y,), _ = norm.train()([x], rev=True)
        torch.testing.assert_close(y, x)
        assert not norm.initialized
        assert not norm.is_initialized

    @pytest.mark.parametrize("deviation", [0, 1e-7, 0.01, 0.4])
    def test_a_channel_that_hardly_varies_is_stretched_twice_as_much_as_the_median_one_at_most(self, deviation):
        norm = ActNorm([(6,)]).train()
        x = torch.randn(500, 6)
        x[:, 2] *= deviation
        norm([x])
        stretch = norm.scale.exp()
        assert stretch[2].item() == pytest.approx(2 / x.std(0, correction=0).median().item(), rel=1e-4)
        assert (stretch[2] >= stretch).all()

    def test_an_outlying_channel_leaves_no_channel_without_bound(self):
        norm = ActNorm([(6,)]).train()
        x = torch.randn(500, 6) * 1e-6
        x[:, 0] *= 1e6
        norm([x])
        assert norm.scale.exp().max() < 110

    def test_constant_channels_stay_finite(self):
        norm = ActNorm([(3,)]).train()
        x = torch.randn(50, 3)
        x[:, 1] = 4
        (y,), _ = norm([x])
        assert torch.isfinite(y).all()
        (back,), _ = norm([y], rev=True)
        torch.testing.assert_close(back, x)

    @pytest.mark.parametrize("initialized", [False, True])
    def test_state_dict_keeps_whether_it_was_initialized(self, initialized):
        norm = ActNorm([(6,)]).train()
        x = torch.randn(50, 6) + 3
        if initialized:
            norm([x])
        buffer = io.BytesIO()
        torch.save(norm.state_dict(), buffer)
        buffer.seek(0)
        restored = ActNorm([(6,)]).train()
        restored.load_state_dict(torch.load(buffer, weights_only=True))
        (y,), _ = restored([x - 100])
        assert (y.mean().abs() < 1e-3) != initialized

    def test_can_be_pickled(self):
        assert isinstance(pickle.loads(pickle.dumps(ActNorm([(6,)]))), nn.Module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"num_units": 0}, "num_units must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"lipschitz": 1.0}, "lipschitz must be between 0 and 1"),
        ({"pila_k": 0.0}, "pila_k must be positive"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InvertibleNetwork(8, InvertibleOptions(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_folded_once_give_the_values_and_gradients_of_those_folded_in_each_pass(dtype):
    network = InvertibleNetwork(12, InvertibleOptions(hidden_dim=6)).to(dtype).train()
    x = torch.randn(30, 12, dtype=dtype)
    network.initialize(x)
    state = copy.deepcopy(network.state_dict())

    def run(context):
        network.load_state_dict(state)  # a pass in training mode moves the spectral norms' vectors
        network.zero_grad()
        with context:
            z = network(x)
            back = network.inverse(z * 0.9)
        (z.square().sum() + back.sin().sum()).backward()
        return z, back, [parameter.grad for parameter in network.parameters()]

    # The cache alone keeps the vectors from moving again in the inverse.
    torch.testing.assert_close(run(network.folded()), run(parametrize.cached()))
    assert all(not module.is_folded for module in network.modules() if isinstance(module, MonotoneUnit))
