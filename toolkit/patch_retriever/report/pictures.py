"""Items for a page: texts, small pictures and heat over their patches, all inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from patch_retriever.items import Item

if TYPE_CHECKING:
    from PIL import Image

SIDE = 112
"""Pixels of a thumbnail's longer side at most."""
HEAT = (255, 0, 200)
"""The colour of heat; the page's style sheet has the same for tokens."""


@dataclass(frozen=True)
class Shown:
    """An item as a page shows it: its text, its picture as a data URI, what the picture is."""

    text: str | None
    picture: str | None
    alt: str


def show(item: Item, side: int = SIDE) -> Shown:
    """An item with a thumbnail of its picture, of several the first.

    Raises:
        UserError: its picture cannot be read any more.
    """
    if item.picture is None:
        return Shown(item.text, None, "")
    return Shown(item.text, thumbnail(item.picture.open(), side), Path(item.picture.name).name)


def thumbnail(picture: Image.Image, side: int = SIDE) -> str:
    """A small JPEG as a data URI."""
    small = picture.copy()
    small.thumbnail((side, side))
    return _data_uri(small, "jpeg", quality=85, optimize=True)


def heat_overlay(heat_hw: Tensor, largest: float) -> str:
    """A PNG of a pixel a patch, to be stretched over a thumbnail: clear at 0, at `largest` dense.
    A data URI."""
    from PIL import Image

    shares_hw = (heat_hw / max(largest, 1e-30)).clamp(0, 1)
    alpha_hw = (shares_hw * 200).round().byte().numpy()
    overlay = Image.new("RGBA", alpha_hw.shape[::-1], HEAT)
    overlay.putalpha(Image.fromarray(alpha_hw))
    return _data_uri(overlay, "png")


def _data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
