"""Scenes drawn with Pillow: 72x72 pixels, jittered, turned, lit and noisy."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from patch_retriever.scenes.world import Scene, Thing

IMAGE_SIZE = 72
"""Pixels on a side: 3x3 cells of 24 pixels."""

_CELL = IMAGE_SIZE // 3
_OVER = 3  # supersampling: shapes are drawn this much larger, then averaged down
_ANGLES = (-12, -8, -4, 0, 4, 8, 12)
_RADII = {"small": (6.8, 7.2, 7.6), "large": (10.0, 10.4, 10.8)}

RGB = {
    "red": (214, 40, 40),
    "green": (46, 180, 70),
    "blue": (50, 105, 235),
    "yellow": (245, 225, 50),
    "orange": (245, 135, 25),
    "purple": (150, 60, 200),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
    "black": (14, 14, 16),
    "grey": (120, 122, 126),
    "brown": (96, 62, 36),
    "navy": (16, 24, 84),
    "olive": (92, 98, 30),
    "teal": (10, 92, 96),
}


def render(scene: Scene, view: int = 0) -> Image.Image:
    """Draw `scene` as an RGB picture.

    `view` seeds everything that the scene leaves open (jitter, rotation, exact size, light,
    noise): two views of one scene are different pictures of the same thing.
    """
    rng = random.Random(f"{scene.key}/{view}")
    canvas = Image.new("RGB", (IMAGE_SIZE * _OVER, IMAGE_SIZE * _OVER), RGB[scene.background])
    for thing in scene.things:
        mask = _mask(thing.shape, thing.fill, rng.choice(_RADII[thing.size]), rng.choice(_ANGLES))
        canvas.paste(RGB[thing.colour], _corner(thing, rng), mask)
    pixels_hwc = np.asarray(canvas.reduce(_OVER), dtype=np.float32)
    light = rng.uniform(0.85, 1.1) + rng.uniform(-0.08, 0.08) * np.linspace(
        -1, 1, IMAGE_SIZE, dtype=np.float32
    )
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(
        pixels_hwc.shape, dtype=np.float32
    )
    pixels_hwc = pixels_hwc * light[None, :, None] + 4.0 * noise
    return Image.fromarray(pixels_hwc.clip(0, 255).astype(np.uint8))


def _corner(thing: Thing, rng: random.Random) -> tuple[int, int]:
    """Top-left corner of the thing's cell on the large canvas, jittered by up to 1.5 pixels."""
    row, column = divmod(thing.place, 3)
    jitter = _OVER * 3 // 2
    return (
        column * _CELL * _OVER + rng.randint(-jitter, jitter),
        row * _CELL * _OVER + rng.randint(-jitter, jitter),
    )


@cache  # 8 shapes x 3 fills x 6 radii x 7 angles: 1008 masks of 5 kB
def _mask(shape: str, fill: str, radius: float, angle: int) -> Image.Image:
    """Coverage (0..255) of one shape on a cell of the large canvas."""
    mask = _silhouette(shape, radius, angle)
    if fill == "outlined":
        mask = ImageChops.subtract(mask, _silhouette(shape, radius * 0.58, angle))
    elif fill == "striped":
        period, width = _OVER * 5, _OVER * 3
        side = mask.size[0]
        stripes = Image.new("L", mask.size, 70)  # faint gaps: the outline of the shape stays
        draw = ImageDraw.Draw(stripes)
        for top in range(side // 2 % period - period, side, period):
            draw.rectangle((0, top, side, top + width - 1), fill=255)
        mask = ImageChops.multiply(mask, stripes)
    return mask


def _silhouette(shape: str, radius: float, angle: int) -> Image.Image:
    side = _CELL * _OVER
    middle, r = side / 2, radius * _OVER
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)

    def disc(x: float, y: float, size: float, fill: int = 255) -> None:
        draw.ellipse((x - size, y - size, x + size, y + size), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(middle + r * x, middle + r * y) for x, y in points], fill=255)

    match shape:
        case "circle":
            disc(middle, middle, r)
        case "square":
            polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])
        case "triangle":
            polygon([(0, -1), (0.95, 0.75), (-0.95, 0.75)])
        case "star":
            spokes = [(1.05 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)]
            polygon([(d * math.sin(a), -d * math.cos(a)) for d, a in spokes])
        case "heart":
            polygon([(-0.93, -0.1), (0, -0.35), (0.93, -0.1), (0, 1.0)])
            disc(middle - 0.48 * r, middle - 0.38 * r, 0.52 * r)
            disc(middle + 0.48 * r, middle - 0.38 * r, 0.52 * r)
        case "cross":
            polygon([(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)])
            polygon([(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)])
        case "moon":
            disc(middle, middle, r)
            disc(middle + 0.55 * r, middle - 0.1 * r, 0.82 * r, fill=0)
        case "diamond":
            polygon([(0, -1.08), (0.68, 0), (0, 1.08), (-0.68, 0)])
    return mask.rotate(angle, resample=Image.Resampling.BILINEAR)
