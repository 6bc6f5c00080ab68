import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from anomalib_decad.components import PrototypePrior, Prototypes


def make_prototypes(count, images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal, abnormal = torch.randn(count, 6, generator=generator), torch.randn(count, 4, generator=generator)
    image = torch.arange(count) % images
    return Prototypes(normal.half(), abnormal.half(), image, torch.randn(images, 3, generator=generator))


def make_prior(*products, num_neighbors=3):
    prior = PrototypePrior(6, 4, num_neighbors)
    prior.set(products)
    return prior


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=3), neighbors=st.integers(1, 8), seed=st.integers(0, 9))
def test_it_is_the_softmax_mean_of_the_nearest_prototypes_of_the_product(counts, neighbors, seed):
    products = [make_prototypes(count, seed=seed + row) for row, count in enumerate(counts)]
    prior = make_prior(*products, num_neighbors=neighbors)
    normal = torch.randn(len(counts), 5, 6)
    result = prior(normal, torch.arange(len(counts)))
    for row, product in enumerate(products):
        distances, index = torch.cdist(normal[row], product.normal.float()).square().sort(1)
        if len(product.normal) >= neighbors:
            distances, index = distances[:, :neighbors], index[:, :neighbors]
            weights = (-4 * distances / distances[:, -1:]).softmax(-1)
            expected = (weights[..., None] * product.abnormal.float()[index]).sum(1)
            torch.testing.assert_close(result[row], expected, rtol=1e-3, atol=1e-3)


def test_a_prototype_explains_itself_and_another_product_does_not():
    first, second = make_prototypes(20), make_prototypes(20, seed=1)
    prior = make_prior(first, second, num_neighbors=1)
    normal = first.normal.float()[None]
    torch.testing.assert_close(prior(normal, torch.tensor([0])), first.abnormal.float()[None])
    assert functional.mse_loss(prior(normal, torch.tensor([1])), first.abnormal.float()[None]) > 0.5


def test_prototypes_of_the_image_itself_can_be_left_out():
    product = make_prototypes(40, images=4)
    prior = make_prior(make_prototypes(7, seed=3), product)
    rows = product.image == 2
    normal, image = product.normal[rows].float()[None], prior.find_images(product.descriptors[2:3])
    assert image.tolist() == [1 + 2]
    normal_part, abnormal, images = (tensor[~rows] for tensor in product[:3])
    others = make_prior(Prototypes(normal_part, abnormal, images, product.descriptors))
    torch.testing.assert_close(prior(normal, torch.tensor([1]), image), others(normal, torch.tensor([0])))


def test_a_product_of_one_image_is_explained_by_it_all_the_same():
    product = make_prototypes(20)
    prior = make_prior(product, num_neighbors=20)
    expected = prior(product.normal.float()[None], torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(expected, product.abnormal.float().mean(0).expand_as(expected), rtol=1e-3, atol=1e-3)


def test_prototypes_of_a_product_can_be_had_and_set_again():
    products = make_prototypes(9, images=3), make_prototypes(4, images=2, seed=1)
    prior = make_prior(*products)
    again = make_prior(prior.of(1), prior.of(0))
    for index, product in enumerate(reversed(products)):
        for actual, expected in zip(again.of(index), product, strict=True):
            torch.testing.assert_close(actual, expected, check_dtype=False)


def test_a_state_dict_brings_its_shapes():
    prior, other = make_prior(make_prototypes(9), make_prototypes(5)), PrototypePrior(6, 4, 3)
    other.load_state_dict(prior.state_dict())
    normal, product = torch.randn(2, 5, 6), torch.tensor([1, 0])
    assert torch.equal(other(normal, product), prior(normal, product))


def test_nothing_is_expected_before_there_are_prototypes():
    assert not PrototypePrior(6, 4)(torch.randn(2, 5, 6), torch.zeros(2).long()).any()


def test_is_wide_under_automatic_mixed_precision():
    prior, normal = make_prior(make_prototypes(9)), torch.randn(1, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior(normal, torch.tensor([0])), prior(normal.float(), torch.tensor([0])))
    assert prior(normal.double(), torch.tensor([0])).dtype == torch.float64


@pytest.mark.parametrize("name", ["num_normal", "num_abnormal", "num_neighbors"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PrototypePrior(**{"num_normal": 6, "num_abnormal": 4, name: 0})
