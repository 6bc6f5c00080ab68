import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from anomalib_decad.components import InvertibleNetwork, InvertibleOptions
from anomalib_decad.components.invertible import FrozenNetwork, chain
from anomalib_decad.components.invertible import network as network_module
from anomalib_decad.components.invertible.chain import scaled_pila, spectral_norm


@pytest.fixture(autouse=True, scope="module")
def _strong_units():
    """Units that bend as much as they may: near the identity, where training starts, nothing is hard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_module, "_GAIN", 0.9999)
        yield


def make_network(dim, dtype=torch.float32, **kwargs):
    network = InvertibleNetwork(dim, InvertibleOptions(**kwargs)).to(dtype).train()
    network.initialize(torch.randn(256, dim, dtype=dtype))
    return network


def train(network, steps=60, lr=1e-2):
    """Train hard towards a split latent, as the decoupler is trained, to leave the benign initialization."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    network.train()
    mixing = torch.randn(network.dim, network.dim) / network.dim**0.5
    for _ in range(steps):
        z = network(torch.randn(128, network.dim) @ mixing.tanh())
        half = network.dim // 2
        loss = z[:, :half].square().mean() - z[:, half:].abs().clamp(max=3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def g_of(network, index, u):
    """Compute G of a unit by its formula."""
    units = network.units

    def normalized(name):
        weight = units[f"{name}_weight"][index]
        return weight / spectral_norm(weight)

    v = functional.linear(u, normalized("encode"), units["encode_bias"][index])
    for layer, name in enumerate(("first", "second")):
        eta = functional.normalize(functional.softplus(network.eta[layer, index]), dim=0)
        k = network.options.pila_k
        added = scaled_pila(k * functional.linear(v, normalized(name), units[f"{name}_bias"][index])) / (2 * k)
        v = torch.cat([eta[0] * v, eta[1] * added], dim=-1)
    g = functional.linear(v, normalized("decode"), units["decode_bias"][index])
    return network.options.lipschitz * network.gain[index].sigmoid() * g


def definition(network, x, inverse=False, iterations=130):
    """Compute the network unit by unit: u with (u + G(u)) / 2 = x, then u - x, and an ActNorm after each block."""
    number, per_block = len(network.gain), network.options.num_units
    for index in reversed(range(number)) if inverse else range(number):
        scale, bias = network.norm_scale[index // per_block], network.norm_bias[index // per_block]
        is_last = (index + 1) % per_block == 0
        if inverse and is_last:
            x = (x - bias) * (-scale).exp()
        u = 2 * x
        for _ in range(iterations):
            u = 2 * x - (-1 if inverse else 1) * g_of(network, index, u)
        x = u - x
        if not inverse and is_last:
            x = x * scale.exp() + bias
    return x


@pytest.fixture
def many_iterations(monkeypatch):
    monkeypatch.setattr(network_module.NetworkWeights.__new__, "__defaults__", (60,))
    monkeypatch.setattr(chain, "BACKWARD_ITERATIONS", 60)


@pytest.mark.usefixtures("many_iterations")
@pytest.mark.parametrize(("blocks", "units"), [(3, 2), (1, 1), (1, 4), (5, 1)])
def test_network_and_its_gradient_are_their_definition(blocks, units):
    network = make_network(6, torch.float64, hidden_dim=4, num_blocks=blocks, num_units=units, lipschitz=0.8)
    for norm in (network.norm_scale, network.norm_bias):
        torch.nn.init.normal_(norm, std=0.2)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, dtype=torch.float64)
    for inverse in (False, True):
        actual = network.inverse(x) if inverse else network(x)
        expected = definition(network, x, inverse)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        wanted = [x, *network.parameters()]
        gradients = (torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True) for out in (actual, expected))
        for mine, true in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-7, atol=1e-9)


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


def test_iterations_follow_from_the_weights_and_are_restored_with_them():
    network = train(make_network(33)).eval()
    restored = InvertibleNetwork(33).eval()
    before = restored.weights().iterations
    restored.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert restored.weights().iterations == network.weights().iterations > before - 1
        x = torch.randn(9, 33)
        torch.testing.assert_close(restored(x), network(x))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 64])
def test_lipschitz_constant_of_g_stays_below_one(dim):
    network = make_network(dim)
    for phase in range(3):
        for index in range(6):
            for scale in (0.1, 1.0, 10.0):
                point = scale * torch.randn(dim)
                jacobian = torch.autograd.functional.jacobian(lambda u, i=index: g_of(network, i, u), point)
                assert torch.linalg.matrix_norm(jacobian, ord=2).item() < 1, phase
        train(network, steps=40, lr=3e-2)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 9)
)
def test_spectral_norm_is_the_largest_singular_value(rows, columns, scale, seed):
    torch.manual_seed(seed)
    weight = scale * torch.randn(3, rows, columns, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(weight, ord=2)
    actual = spectral_norm(weight)[..., 0, 0]
    assert ((actual <= expected * (1 + 1e-9)) & (actual >= 0.99 * expected)).all()


def test_the_plain_iteration_is_taken_where_preconditioning_fails(monkeypatch):
    network = train(make_network(16))
    counts = iter([64, 20])
    monkeypatch.setattr(network_module, "_needed_iterations", lambda _: next(counts))
    network.eval()
    x = torch.randn(50, 16)
    with torch.no_grad():
        assert network.weights().iterations == 20
        assert relative_error(network.inverse(network(x)), x) <= 1e-3


def test_frozen_network_computes_the_same_and_can_be_pickled():
    network = train(make_network(33), steps=20).train()
    frozen = FrozenNetwork(network.fold(converged=True))
    assert network.training
    network.eval()
    x = torch.randn(2, 30, 33)
    with torch.no_grad():
        z = network(x)
        torch.testing.assert_close(frozen(x), z)
        torch.testing.assert_close(frozen.inverse(z), network.inverse(z))
    assert not list(frozen.parameters())
    for module in (frozen, network):
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))


def test_evaluation_writes_nothing_and_sees_every_change():
    network = make_network(16).eval()
    x = torch.randn(9, 16)
    with torch.no_grad():
        before = network(x)
        state = {name: id(value) for name, value in vars(network).items()}
        network(x)
        network.inverse(x)
        assert {name: id(value) for name, value in vars(network).items()} == state
        network.units["encode_weight"].add_(0.5)
        after = network(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(copy.deepcopy(network)(x), after)
    network(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.to(torch.float64)(x.double()).dtype == torch.float64


def test_rows_do_not_depend_on_each_other():
    network = make_network(16).eval()
    x = torch.randn(2, 9, 16)
    changed = x.clone()
    changed[0, 3] += 5
    with torch.no_grad():
        different = (network(x) - network(changed)).abs().amax(-1) > 1e-5
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
        assert 0 < relative_error(actual, exact) < 3e-2


@pytest.mark.parametrize(("mode", "dtype"), [(False, torch.bfloat16), (False, torch.float16), (True, torch.float16)])
def test_precision_is_kept_in_eval_mode_and_where_numbers_could_overflow(mode, dtype):
    network = make_network(16).train(mode)
    x = torch.randn(9, 16)
    expected = network(x)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)
        z = network(x.bfloat16())
    assert z.dtype == torch.float32


class TestActNorm:
    """The scale and bias after a block that hardly changes anything else."""

    @pytest.fixture(autouse=True)
    def _weak_units(self, monkeypatch):
        monkeypatch.setattr(network_module, "_GAIN", 1e-7)

    def make(self, x):
        network = InvertibleNetwork(x.shape[1], InvertibleOptions(num_blocks=1, num_units=1, hidden_dim=4)).train()
        network.initialize(x)
        return network

    def test_normal_embeddings_get_mean_zero_and_variance_one_once(self):
        x = torch.randn(500, 6) * torch.tensor([0.8, 1.0, 1.2, 2.0, 5.0, 9.0]) + 3
        network = self.make(x)
        z = network(x)
        torch.testing.assert_close(z.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(6), rtol=1e-3, atol=0)
        before = network.norm_scale.clone()
        network.initialize(2 * x)
        assert torch.equal(network.norm_scale, before)

    @pytest.mark.parametrize("deviation", [0, 1e-7, 0.01, 0.4])
    def test_a_channel_that_hardly_varies_is_stretched_twice_as_much_as_the_median_one_at_most(self, deviation):
        x = torch.randn(500, 6)
        x[:, 2] *= deviation
        (stretch,) = self.make(x).norm_scale.exp()
        assert stretch[2].item() == pytest.approx(2 / x.std(0, correction=0).median().item(), rel=1e-3)
        assert (stretch[2] >= stretch).all()

    def test_an_outlying_or_constant_channel_leaves_no_channel_without_bound(self):
        x = torch.randn(500, 6) * 1e-6
        x[:, 0] *= 1e6
        assert self.make(x).norm_scale.exp().max() < 110
        assert torch.isfinite(self.make(torch.full((50, 3), 4.0)).norm_scale).all()
