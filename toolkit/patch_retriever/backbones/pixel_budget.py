"""The budget of pixels: how large a picture a processor makes tokens of."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

from patch_retriever.backbones.families import family_of
from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def limit_pixels(transformer: Transformer, max_pixels: int, name: str) -> None:
    """Let no picture be larger than `max_pixels` when it is cut into patches; one that is larger is
    made smaller. The processor's own limit stays where it is lower. An export keeps it.

    A small copy of the whole picture, which some families add to its tiles, does not count.

    Raises:
        UserError: the family's pictures all become equally many tokens, or not even the smallest
            picture would be within the budget, or the family is not known.
    """
    family = family_of(transformer.config)
    if family is None:
        raise UserError(
            f"{name}: no record of the family {transformer.config.model_type!r}, so its budget of "
            "pixels cannot be set; set that of its image processor and save it, or leave it out"
        )
    if family.pixels is None:
        raise UserError(
            f"{name}: {family.name} makes equally many tokens of every picture; leave the budget "
            "of pixels out"
        )
    processor: Any = transformer.processor
    image: Any = processor.image_processor
    least = _least(image, family.pixels)
    if max_pixels < least:
        raise UserError(f"{name}: {max_pixels} pixels are too few; its least is {least}")
    if family.pixels == "area":
        most = min(max_pixels, image.size["longest_edge"])
        fewest = min(most, image.size["shortest_edge"])
        image.size = {"shortest_edge": fewest, "longest_edge": most}
    elif family.pixels == "edge":
        tile = image.max_image_size["longest_edge"]
        edge = isqrt(max_pixels) // tile * tile
        image.size = {"longest_edge": min(edge, image.size["longest_edge"])}
    elif family.pixels == "tiles":
        image.max_patches = min(max_pixels // least, image.max_patches)
        image.min_patches = min(image.min_patches, image.max_patches)
    else:  # the model undoes the padding by the same grids
        grids = [[h, w] for h, w in image.image_grid_pinpoints if h * w <= max_pixels]
        image.image_grid_pinpoints = transformer.config.image_grid_pinpoints = grids


def _least(image: Any, budget: str) -> int:
    """Pixels of the smallest picture that the image processor makes."""
    if budget == "area":  # one token
        return int((image.patch_size * image.merge_size) ** 2)
    if budget == "edge":
        return int(image.max_image_size["longest_edge"] ** 2)
    if budget == "tiles":
        return int(image.size["height"] * image.size["width"])
    return int(min(h * w for h, w in image.image_grid_pinpoints))
