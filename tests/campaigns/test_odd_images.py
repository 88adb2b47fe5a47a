"""Two thousand odd images: each is decoded to RGB or refused by name in one line, whatever its
bytes are; nothing else is raised, and what is decoded has the size that its head says."""

from __future__ import annotations

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import PictureBytes

FORMATS = (
    *("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "ICO", "TGA", "PCX", "JPEG2000"),
    *("DDS", "EPS", "SGI", "MSP", "IM", "SPIDER"),
)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
SEED, COUNT = 0, 2000


def sound(rng: random.Random) -> tuple[str, bytes] | None:
    """A format's name and an image file of it; None where it does not take the mode."""
    name, mode = rng.choice(FORMATS), rng.choice(MODES)
    size = rng.choice([(1, 1), (3, 50), (64, 64), (300, 1)])
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*size[::-1], 3))
    picture = Image.fromarray(pixels.astype(np.uint8))
    options = {"exif": exif(rng)} if name in ("JPEG", "PNG", "WEBP") and rng.random() < 0.5 else {}
    stream = io.BytesIO()
    try:
        picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
        source = picture.convert("L") if mode in ("I", "I;16", "F") else picture
        source.convert(mode).save(stream, name, **options)
    except (OSError, ValueError, KeyError, SystemError):
        return None
    return name, stream.getvalue()


def exif(rng: random.Random) -> bytes:
    made = Image.Exif()
    made[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 65_535])
    made[0x010F] = rng.choice(["maker", "", "x" * 300])
    data = bytearray(made.tobytes())
    for _ in range(rng.choice([0, 0, 3])):
        data[rng.randrange(8, len(data))] = rng.randrange(256)
    return bytes(data)


def damaged(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return data
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    changed = bytearray(data)
    if kind in (2, 3):
        for _ in range(rng.choice([1, 1, 8, 64])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 4:  # the head, where sizes and offsets are
        for _ in range(4):
            changed[rng.randrange(min(64, len(changed)))] = rng.choice([0, 1, 127, 255])
    else:
        at = rng.randrange(len(changed))
        changed[at:at] = rng.randbytes(rng.choice([1, 100]))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds in them
def test_each_is_decoded_or_refused_in_one_line():
    rng = random.Random(SEED)
    tally: Counter[str] = Counter()
    while sum(tally.values()) < COUNT:
        made = sound(rng)
        if made is None:
            continue
        name, data = made
        picture = PictureBytes(f"odd/{name}.jpg", damaged(rng, data))
        size = picture.size()
        try:
            found = picture.open()
        except UserError as error:
            line = str(error)
            assert line.startswith(f"odd/{name}.jpg: not a readable image (")
            assert line.isprintable() and len(line) <= 300, line
            tally["refused by name"] += 1
            continue
        assert found.mode == "RGB"
        assert size is not None
        assert found.size in (size, size[::-1])
        tally["decoded"] += 1
    print(dict(tally))
    assert tally["decoded"] > COUNT / 4
    assert tally["refused by name"] > COUNT / 4
