"""Pictures of every kind as bytes, and files that hold them, written as users' tools do."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(3), "JPEG", exif=exif)


SOUND = {
    "rgb.png": encoded(noise(), "PNG"),
    "grey.png": encoded(noise(1).convert("L"), "PNG"),
    "cmyk.jpg": encoded(noise(2).convert("CMYK"), "JPEG"),
    "rotated.jpg": rotated(),
    "alpha.webp": encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 99)), "WEBP", lossless=True),
}
BROKEN = {
    "text.jpg": b"no picture",
    "cut.png": encoded(noise(4, (64, 64)), "PNG")[:1500],
    "empty.jpg": b"",
}


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path
