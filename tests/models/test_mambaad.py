"""The scan, its orders, the decoder."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.models.mambaad import selective_scan as scan_module
from anomalib_decad.models.mambaad.bottleneck import HalfFPN
from anomalib_decad.models.mambaad.decoder import HybridStateSpace, MambaDecoder, scan_orders
from anomalib_decad.models.mambaad.selective_scan import selective_scan


def inputs(length, batch=2, groups=2, dim=3, states=4):
    sequence, matrix = (batch, groups, dim, length), (batch, groups, states, length)
    shapes = sequence, sequence, (groups, dim, states), matrix, matrix, (groups, dim)
    x, delta, a, b, c, d = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, delta.exp(), -a.exp(), b, c, d]


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
def test_the_loop_its_gradient_and_the_exported_scan_equal_the_recurrence(length, seed):
    torch.manual_seed(seed)
    arguments = [tensor.requires_grad_() for tensor in inputs(length)]
    expected = reference(*arguments)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), arguments)
    actual = selective_scan(*arguments)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad((actual * weights).sum(), arguments), wanted)
    *exported, d = (tensor.detach().float() for tensor in arguments)
    y = scan_module._doubling(*exported) + d[..., None] * exported[0]
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_kernel_of_mamba_ssm_is_given_the_same_recurrence(monkeypatch):
    """No GPU at hand: the package's own reference has this signature and these shapes."""

    def selective_scan_fn(u, delta, A, B, C, D):
        batch, channels, length = u.shape
        groups = B.shape[1]
        shape = (batch, groups, channels // groups, length)
        parts = (A.unflatten(0, shape[1:3]), B, C, D.unflatten(0, shape[1:3]))
        return reference(u.reshape(shape), delta.reshape(shape), *parts).reshape(u.shape)

    module = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, module)
    arguments = inputs(9)
    torch.testing.assert_close(scan_module._kernel(*arguments), selective_scan(*arguments))


@pytest.mark.parametrize("grid", [(8, 8), (5, 5), (3, 7)])
def test_each_direction_visits_each_position_once(grid):
    orders = scan_orders(grid, 8)
    assert orders.shape == (8, grid[0] * grid[1])
    assert (orders.sort(dim=1).values == torch.arange(grid[0] * grid[1])).all()
    # A Hilbert curve is its own mirror image backwards, so that two of the eight fall together with others.
    assert len({tuple(order.tolist()) for order in orders}) >= 6
    assert torch.equal(orders[:4].flip(-1), orders[4:])


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_a_hilbert_curve_goes_from_neighbor_to_neighbor(side):
    places = np.stack(np.divmod(scan_orders((side, side), 8).numpy(), side))
    assert (np.abs(np.diff(places, axis=-1)).sum(0) == 1).all()
    quadrants = (places[:, 0] * 2 // side * [[2], [1]]).sum(0).reshape(4, -1)
    # A quadrant is filled before it is left.
    assert (quadrants == quadrants[:, :1]).all()


def test_each_position_sees_all_others_whatever_the_direction():
    layer = HybridStateSpace(dim=4, grid=(4, 4), num_directions=2).eval()
    x = torch.randn(1, 4, 4, 4)
    gradients = torch.autograd.functional.jacobian(lambda x: layer(x).sum(-1).flatten(), x).flatten(1)
    assert (gradients.unflatten(1, (16, 4)).abs().sum(-1) > 0).all()


def test_the_decoder_gives_the_pyramid_of_the_encoder():
    decoder = MambaDecoder(dim=32, grid=(2, 3), depths=(2, 3, 2, 2), num_directions=4)
    maps = decoder(torch.randn(2, 32, 2, 3))
    assert [tuple(one.shape) for one in maps] == [(2, 4, 16, 24), (2, 8, 8, 12), (2, 16, 4, 6)]
    assert HalfFPN([4, 8, 16])(maps).shape == (2, 32, 2, 3)
