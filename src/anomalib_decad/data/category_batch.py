# SPDX-License-Identifier: Apache-2.0
"""anomalib's image items and batches, with the category of each image."""

from dataclasses import dataclass, fields
from typing import ClassVar

from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem

__all__ = ["CategoryBatch", "CategoryItem"]


@dataclass
class NumpyCategoryItem(NumpyImageItem):
    """Numpy image item that knows its category."""

    category: str | None = None


@dataclass
class NumpyCategoryBatch(NumpyImageBatch):
    """Numpy batch of images that knows their categories."""

    item_class: ClassVar[type[NumpyCategoryItem]] = NumpyCategoryItem
    category: list[str] | None = None


@dataclass
class CategoryItem(ImageItem):
    """Image item that knows its category.

    Args:
        category (str | None): Name of the category.
    """

    numpy_class: ClassVar[type[NumpyCategoryItem]] = NumpyCategoryItem
    category: str | None = None

    @classmethod
    def from_item(cls, item: ImageItem, category: str) -> "CategoryItem":
        """Add the category to an item."""
        return cls(**{field.name: getattr(item, field.name) for field in fields(item)}, category=category)


@dataclass
class CategoryBatch(ImageBatch):
    """Batch of images that knows their categories.

    Args:
        category (list[str] | None): Name of each image's category.
    """

    item_class: ClassVar[type[CategoryItem]] = CategoryItem
    numpy_class: ClassVar[type[NumpyCategoryBatch]] = NumpyCategoryBatch
    category: list[str] | None = None

    @classmethod
    def collate(cls, items: list[CategoryItem]) -> "CategoryBatch":  # type: ignore[override]
        """Make a batch of items.

        Categories may differ in what they know. A batch has a field only if all of its items have it, apart from the
        paths of masks, which normal images lack.

        Args:
            items (list[CategoryItem]): Items of one batch. Images of different sizes are resized to the largest.

        Returns:
            CategoryBatch: The batch.
        """
        for field in fields(CategoryItem):
            missing = [item for item in items if getattr(item, field.name) is None]
            if 0 < len(missing) < len(items):
                is_path = field.name == "mask_path"
                for item in missing if is_path else items:
                    # Past the validation: anomalib's validator of a path refuses the empty one.
                    item.__dict__[field.name] = "" if is_path else None
        return super().collate(items)  # type: ignore[arg-type, return-value]
