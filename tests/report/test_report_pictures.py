"""Thumbnails and heat, as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.report.pictures import HEAT, SIDE, Shown, heat_overlay, show, thumbnail


def opened(uri: str) -> Image.Image:
    head, data = uri.split(",", 1)
    assert head in ("data:image/jpeg;base64", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(
    ("size", "small"),
    [((72, 72), (72, 72)), ((448, 224), (112, 56)), ((3, 900), (1, 112)), ((1, 1), (1, 1))],
)
def test_a_thumbnail_is_small_and_keeps_its_shape(size, small):
    picture = Image.new("RGB", size, (200, 30, 30))
    found = opened(thumbnail(picture))
    assert (found.format, found.size) == ("JPEG", small)
    assert max(found.size) <= SIDE
    assert picture.size == size
    np.testing.assert_allclose(np.asarray(found.convert("RGB")).mean((0, 1)), (200, 30, 30), atol=6)


def test_heat_is_a_pixel_a_patch_clear_at_zero_and_densest_at_the_largest():
    heat_hw = torch.tensor([[0.0, 1.0, 2.0], [4.0, 0.5, 8.0]])
    overlay = opened(heat_overlay(heat_hw, 4.0))
    assert (overlay.format, overlay.mode, overlay.size) == ("PNG", "RGBA", (3, 2))
    pixels_hwc = np.asarray(overlay)
    assert (pixels_hwc[..., :3] == HEAT).all()
    np.testing.assert_array_equal(pixels_hwc[..., 3], [[0, 50, 100], [200, 25, 200]])


def test_without_any_heat_the_overlay_is_clear():
    assert not np.asarray(opened(heat_overlay(torch.zeros(2, 2), 0.0)))[..., 3].any()


def test_an_item_is_shown_by_what_it_holds(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "a photo.png")
    picture = PictureFile(tmp_path / "a photo.png")
    assert show(Item("words")) == Shown("words", None, "")
    image, both = show(Item(picture=picture)), show(Item("words", picture))
    assert image.text is None and both.text == "words"
    assert image.picture == both.picture == thumbnail(picture.open())
    assert image.alt == "a photo.png"  # and not where the user keeps it


def test_of_several_pictures_the_first_is_shown(tmp_path):
    pictures = [PictureFile(tmp_path / f"{colour}.png") for colour in ("red", "blue")]
    for picture in pictures:
        Image.new("RGB", (8, 8), picture.path.stem).save(picture.path)
    assert show(Item.of("both", pictures)) == show(Item("both", pictures[0]))
