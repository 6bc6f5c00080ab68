"""Products are recognized, and what is none of them is told."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components import CategoryRecognizer


def products(count, dim=24, images=12, seed=0):
    """Descriptors of products whose images differ less from each other than the products do."""
    generator = torch.Generator().manual_seed(seed)
    centers = 5 * torch.randn(count, 1, dim, generator=generator)
    rows = centers + torch.randn(count, images, dim, generator=generator)
    return {f"product {index}": rows[index] for index in range(count)}


def as_features(descriptors):
    """Token maps whose mean is the descriptor, in two layers."""
    noise = torch.randn(len(descriptors), 9, descriptors.shape[1])
    tokens = descriptors[:, None] + noise - noise.mean(1, keepdim=True)
    return list(tokens.split(descriptors.shape[1] // 2, dim=2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(2, 20), st.integers(0, 1000))
def test_new_images_are_recognized(count, images, seed):
    recognizer = CategoryRecognizer()
    recognizer.learn(products(count, images=images, seed=seed))
    assert recognizer.names == [f"product {index}" for index in range(count)]
    for index, rows in enumerate(products(count, images=40, seed=seed).values()):
        found = recognizer(as_features(rows))
        assert found.dtype == torch.long
        assert (found == index).float().mean() > 0.9


def test_another_product_is_unlike_all(caplog):
    known, recognizer = products(5), CategoryRecognizer()
    left_out = as_features(known.pop("product 3"))
    for some in (known, {"nut": known["product 0"]}):
        recognizer.learn(some)
        assert (recognizer(left_out) == -1).all()
    assert "The data have no product 0, product 1, product 2, product 4 any more" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
def test_one_image_of_each_is_enough(count):
    known = products(count, images=1)
    recognizer = CategoryRecognizer()
    recognizer.learn(known)
    for index, rows in enumerate(known.values()):
        assert recognizer(as_features(rows)).tolist() == [index]


def test_maps_and_tokens_are_described_alike():
    maps = torch.randn(2, 6, 4, 5)
    tokens = maps.flatten(2).mT
    torch.testing.assert_close(CategoryRecognizer.describe({"a": maps}), CategoryRecognizer.describe([tokens]))
    assert CategoryRecognizer.describe([tokens.half()]).dtype == torch.float32


def test_a_state_dict_brings_the_categories():
    recognizer, other = CategoryRecognizer(), CategoryRecognizer()
    recognizer.learn(products(3))
    file = io.BytesIO()
    torch.save(recognizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    features = as_features(torch.cat(list(products(3).values())))
    assert other.names == recognizer.names
    assert torch.equal(other(features), recognizer(features))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*means"):
        other.load_state_dict({})
    assert other.names == recognizer.names


@pytest.mark.parametrize("rows", [torch.empty(0, 4), torch.tensor([[float("nan")] * 4])])
def test_what_cannot_be_learned_is_an_error(rows):
    with pytest.raises(ValueError, match="'nut' cannot be learned"):
        CategoryRecognizer().learn({"bolt": torch.zeros(2, 4), "nut": rows})
