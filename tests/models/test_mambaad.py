"""The scan, its orders, the decoder."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.models.mambaad import selective_scan as scan_module
from anomalib_decad.models.mambaad.bottleneck import HalfFPN
from anomalib_decad.models.mambaad.decoder import HybridStateSpace, MambaDecoder
from anomalib_decad.models.mambaad.scan_order import scan_orders
from anomalib_decad.models.mambaad.selective_scan import selective_scan

CURVES = ["hilbert", "sweep", "scan", "zigzag", "zorder"]


def inputs(length, batch=2, groups=2, dim=3, states=4, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    return [
        random(batch, groups, dim, length),
        random(batch, groups, dim, length).exp(),
        -random(groups, dim, states).exp(),
        random(batch, groups, states, length),
        random(batch, groups, states, length),
        random(groups, dim),
    ]


def reference(x, delta, a, b, c, d):
    """The recurrence, step by step."""
    state = torch.zeros(*x.shape[:-1], a.shape[-1], dtype=x.dtype)
    ys = []
    for t in range(x.shape[-1]):
        state = (delta[..., t, None] * a).exp() * state + (delta * x)[..., t, None] * b[..., None, :, t]
        ys.append((state * c[..., None, :, t]).sum(-1) + d * x[..., t])
    return torch.stack(ys, dim=-1)


@given(length=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_loop_and_its_gradient_equal_autograd_through_the_recurrence(length, seed):
    torch.manual_seed(seed)
    arguments = [tensor.requires_grad_() for tensor in inputs(length)]
    expected = reference(*arguments)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), arguments)
    actual = selective_scan(*arguments)
    torch.testing.assert_close(actual, expected)
    for gradient, reference_gradient in zip(
        torch.autograd.grad((actual * weights).sum(), arguments), wanted, strict=True
    ):
        torch.testing.assert_close(gradient, reference_gradient)


@given(length=st.integers(1, 70))
@settings(max_examples=10, deadline=None)
def test_what_is_exported_equals_the_loop(length):
    *arguments, d = inputs(length, dtype=torch.float32)
    expected = selective_scan(*(tensor.double() for tensor in (*arguments, d)))
    torch.testing.assert_close(
        scan_module._doubling(*arguments) + d[..., None] * arguments[0], expected.float(), rtol=1e-4, atol=1e-4
    )


def test_the_kernel_of_mamba_ssm_is_given_the_same_recurrence(monkeypatch):
    """No GPU at hand: the package's own reference has this signature and these shapes."""
    import sys
    import types

    def selective_scan_fn(u, delta, A, B, C, D):
        batch, channels, length = u.shape
        groups = B.shape[1]
        shape = (batch, groups, channels // groups, length)
        parts = (A.unflatten(0, shape[1:3]), B, C, D.unflatten(0, shape[1:3]))
        return reference(u.reshape(shape), delta.reshape(shape), *parts).reshape(u.shape)

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    arguments = inputs(9)
    torch.testing.assert_close(scan_module._kernel(*arguments), selective_scan(*arguments))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("grid", [(8, 8), (5, 5), (3, 7)])
def test_each_direction_visits_each_position_once(curve, grid):
    orders = scan_orders(grid, curve, 8)
    assert orders.shape == (8, grid[0] * grid[1])
    assert (orders.sort(dim=1).values == torch.arange(grid[0] * grid[1])).all()
    # A Hilbert curve is its own mirror image backwards, so that two of the eight fall together with others.
    assert curve != "hilbert" or len({tuple(order.tolist()) for order in orders}) >= 6
    assert torch.equal(orders[:4].flip(-1), orders[4:])


@pytest.mark.parametrize("curve", ["hilbert", "scan"])
@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_a_hilbert_curve_goes_from_neighbor_to_neighbor(curve, side):
    places = np.stack(np.divmod(scan_orders((side, side), curve, 8).numpy(), side))
    assert (np.abs(np.diff(places, axis=-1)).sum(0) == 1).all()


def test_a_hilbert_curve_fills_a_quadrant_before_it_leaves_it():
    places = np.stack(np.divmod(scan_orders((8, 8), "hilbert", 2)[0].numpy(), 8)) // 4
    quadrants = (2 * places[0] + places[1]).reshape(4, 16)
    assert (quadrants == quadrants[:, :1]).all()


@pytest.mark.parametrize(("curve", "directions"), [("spiral", 8), ("hilbert", 3)])
def test_unknown_curves_and_directions_are_refused(curve, directions):
    with pytest.raises(ValueError, match="must be"):
        scan_orders((4, 4), curve, directions)


def test_each_position_sees_all_others_whatever_the_direction():
    layer = HybridStateSpace(dim=4, grid=(4, 4), num_directions=2, curve="hilbert").eval()
    x = torch.randn(1, 4, 4, 4)
    gradients = torch.autograd.functional.jacobian(lambda x: layer(x).sum(-1).flatten(), x).flatten(1)
    assert (gradients.unflatten(1, (16, 4)).abs().sum(-1) > 0).all()


def test_the_decoder_gives_the_pyramid_of_the_encoder():
    decoder = MambaDecoder(dim=32, grid=(2, 3), depths=(2, 3, 2, 2), num_directions=4, curve="hilbert")
    maps = decoder(torch.randn(2, 32, 2, 3))
    assert [tuple(one.shape) for one in maps] == [(2, 4, 16, 24), (2, 8, 8, 12), (2, 16, 4, 6)]
    assert HalfFPN([4, 8, 16])(maps).shape == (2, 32, 2, 3)


def test_the_bottleneck_wants_channels_that_double():
    with pytest.raises(ValueError, match="double their channels"):
        HalfFPN([24, 32, 56])


def test_depths_are_checked():
    with pytest.raises(ValueError, match="multiples of 2 or 3"):
        MambaDecoder(32, (2, 2), (5, 2), 4, "hilbert")
