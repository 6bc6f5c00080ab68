# SPDX-License-Identifier: Apache-2.0
"""Which mask belongs to which image: by their names."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

__all__ = ["pair_by_name"]

_Mask = TypeVar("_Mask")


def pair_by_name(
    images: Sequence[tuple[str, str]], masks: Mapping[tuple[str, str], _Mask], anywhere: bool = False
) -> list[_Mask | None]:
    """Find the mask of each image.

    A mask has the stem of its image, or the stem and ``_mask``. Another text before or behind the stem (``mask-003``,
    ``003_gt``) will do if all masks of the folder have it.

    Args:
        images (Sequence[tuple[str, str]]): Folder and stem of each image.
        masks (Mapping[tuple[str, str], _Mask]): The masks by folder and stem.
        anywhere (bool): Whether a mask may be in any folder if no other mask has its name.

    Returns:
        list[_Mask | None]: The mask of each image, or ``None``.

    Example:
        >>> pair_by_name([("hole", "1"), ("hole", "10")], {("hole", "10_mask"): "b", ("hole", "1_mask"): "a"})
        ['a', 'b']
    """
    found: list[_Mask | None] = [None] * len(images)
    for folder in dict.fromkeys(folder for folder, _ in images):
        positions = [position for position, (own, _) in enumerate(images) if own == folder]
        stems = [images[position][1] for position in positions]
        here = {stem: mask for (own, stem), mask in masks.items() if own == folder}
        for position, mask in zip(positions, _pair_folder(stems, here), strict=True):
            found[position] = mask
    if anywhere and None in found:
        counts = Counter(stem for _, stem in images)
        others = Counter(stem for _, stem in masks)
        flat = {stem: mask for (_, stem), mask in masks.items() if others[stem] == 1}
        paired = _pair_folder([stem for _, stem in images], flat)
        found = [
            mask if mask is not None or counts[stem] > 1 else other
            for mask, other, (_, stem) in zip(found, paired, images, strict=True)
        ]
    return found


def _pair_folder(stems: Sequence[str], masks: Mapping[str, _Mask]) -> list[_Mask | None]:
    """Find the masks of one folder's images: by the first naming that all agree with, or else as many as there are."""
    for before, behind in _namings(stems, masks):
        found = [masks.get(f"{before}{stem}{behind}") for stem in stems]
        if None not in found:
            return found
    return [masks.get(f"{stem}_mask", masks.get(stem)) for stem in stems]


def _namings(stems: Sequence[str], masks: Mapping[str, _Mask]) -> Iterator[tuple[str, str]]:
    """Give what may stand before and behind an image's stem in the name of its mask."""
    yield "", "_mask"
    yield "", ""
    # The longest is in the fewest names of masks.
    longest = max(stems, key=len, default="")
    for mask in masks:
        for start in range(len(mask) - len(longest) + 1):
            if mask.startswith(longest, start):
                yield mask[:start], mask[start + len(longest) :]
