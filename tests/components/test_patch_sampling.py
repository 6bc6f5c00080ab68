import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.components import choose_patches, sample_patches


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 3),
    patches=st.integers(1, 30),
    count=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-8, 1, 1e8]),
)
def test_no_patch_is_drawn_twice_and_all_where_there_are_not_as_many(images, patches, count, scale):
    chosen = choose_patches(scale * torch.randn(images, patches, 4), count)
    assert chosen.shape == (images, min(count, patches))
    assert chosen.min() >= 0
    assert chosen.max() < patches
    assert all(len(row.unique()) == len(row) for row in chosen)


def test_patches_that_have_few_like_them_are_drawn_first():
    torch.manual_seed(0)
    background, object_ = 0.1 * torch.randn(360, 8), 3 * torch.randn(40, 8)
    embeddings = torch.cat([background, object_]).expand(20, -1, -1)
    share = (choose_patches(embeddings, 40) >= 360).float().mean()
    assert share > 0.9  # a tenth of the patches


def test_equal_patches_are_drawn_evenly():
    torch.manual_seed(0)
    counts = torch.bincount(choose_patches(torch.zeros(2000, 10, 4), 1).flatten(), minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260


def numbered(num_images, num_patches=10, dim=4, layers=3):
    """Feature maps of which each layer holds its number, the image and the patch."""
    maps = torch.randn(layers, num_images, num_patches, dim)
    maps[..., 0], maps[..., 1] = torch.arange(num_images)[:, None], torch.arange(num_patches)
    maps[..., 2] = torch.arange(layers)[:, None, None]
    return list(maps)


def test_a_sample_has_equally_many_patches_of_each_image_and_the_same_of_each_layer():
    rows, descriptors = sample_patches([numbered(3), numbered(3)], num_images=6, num_patches=20)
    assert [row.shape for row in rows] == [(6, 4, 4)] * 3  # four of each
    for layer, row in enumerate(rows):
        assert torch.equal(row[..., :2], rows[0][..., :2])
        assert row[..., 2].unique().tolist() == [layer]
    assert descriptors.shape == (6, 12)


def test_a_sample_asks_for_no_more_images_than_it_needs_or_there_are():
    def batches():
        yield numbered(4)
        yield numbered(4)
        pytest.fail("a third batch was asked for")

    assert sample_patches(batches(), num_images=5, num_patches=5).features[0].shape[:2] == (8, 1)
    assert sample_patches([numbered(2)], num_images=100, num_patches=100_000).features[0].shape[:2] == (2, 10)
