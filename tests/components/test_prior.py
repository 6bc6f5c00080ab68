import pytest
import torch

from anomalib_decad.components import ConditionalPrior


def test_starts_as_zero():
    assert not ConditionalPrior(6, 4, 8)(torch.randn(2, 5, 6)).any()


def test_fit_finds_what_depends_on_the_normal_component():
    torch.manual_seed(0)
    normal = torch.randn(5000, 6)
    noise = 0.1 * torch.randn(5000, 4)
    abnormal = torch.tanh(normal[:, :4] * normal[:, 1:5]) + noise
    prior = ConditionalPrior(6, 4, 64)
    prior.fit(normal[:4000], abnormal[:4000], batch_size=512)
    with torch.no_grad():
        error = (prior(normal[4000:]) - abnormal[4000:]).square().mean()
    assert error < 0.3 * abnormal.var()


@pytest.mark.parametrize("count", [1, 7, 20])
def test_fit_takes_few_patches_and_leaves_no_gradients(count):
    prior = ConditionalPrior(6, 4, 8)
    with torch.no_grad():
        prior.fit(torch.randn(count, 6), torch.randn(count, 4), num_epochs=3, batch_size=8)
    assert all(parameter.grad is None and parameter.isfinite().all() for parameter in prior.parameters())


def test_is_wide_under_automatic_mixed_precision():
    prior = ConditionalPrior(6, 4, 8)
    x, y = torch.randn(50, 6), torch.randn(50, 4)
    with torch.autocast("cpu", torch.bfloat16):
        prior.fit(x, y, num_epochs=2)
        assert prior(x).dtype == torch.float32


@pytest.mark.parametrize("argument", ["num_normal", "num_abnormal", "hidden_dim"])
def test_channels_are_positive(argument):
    with pytest.raises(ValueError, match=argument):
        ConditionalPrior(**{"num_normal": 2, "num_abnormal": 2, "hidden_dim": 2, argument: 0})
