"""Pictures: anything that can be opened as one, decoded to RGB when it is needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "JPEG2000"),
    *("AVIF", "HEIF", "PPM", "ICO", "TGA", "PCX"),
)
"""Pillow's decoders that are asked, as far as they are installed. No others: some start programs
that they find (EPS: Ghostscript), and a file's name says nothing about its format."""
_LONGEST = 200
"""Letters of what a decoder says."""
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Picture(Protocol):
    """Anything that can be opened as a picture, so that a corpus never sits in memory decoded."""

    @property
    def name(self) -> str:
        """What errors call it."""

    def open(self) -> Image.Image:
        """The decoded RGB picture."""

    def content_hash(self) -> str:
        """Changes when the picture does; the same for the same picture under another name."""


class _Stored:
    """A picture that is kept as the bytes of an image file, wherever those are."""

    @property
    def name(self) -> str:
        """What errors call it."""
        raise NotImplementedError

    @property
    def locator(self) -> str:
        """The name by which `picture_stores.picture_at` opens it from any working folder."""
        return self.name

    def read(self) -> bytes:
        """The bytes."""
        raise NotImplementedError

    def open(self) -> Image.Image:
        """Decode the bytes.

        Raises:
            UserError: they cannot be read or are no image.
        """
        return decode(self.read(), self.name)

    def in_memory(self) -> PictureBytes:
        """The same with its bytes read.

        Raises:
            UserError: they cannot be read.
        """
        return PictureBytes(self.name, self.read())

    def size(self) -> tuple[int, int] | None:
        """Width and height as they are stored, without decoding; None if it is no image."""
        data = self.read()
        try:
            with _opened(data) as file:
                return file.size
        except Exception:  # decoders raise anything on damaged data
            return None

    def content_hash(self) -> str:
        """SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class PictureFile(_Stored):
    """A picture on disk, of any format, mode and orientation that Pillow reads."""

    path: Path

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    @property
    def locator(self) -> str:
        """The file's whole path."""
        return str(self.path.resolve())

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            UserError: the file is missing or cannot be read.
        """
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such image file") from None
        except (OSError, ValueError) as error:  # a null byte in the name is the latter
            raise UserError(f"{self.path}: not a readable image ({error})") from None


@dataclass(frozen=True)
class PictureBytes(_Stored):
    """A picture in memory, as the bytes of an image file; `called` is its name."""

    called: str
    data: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """As it was called."""
        return self.called

    def read(self) -> bytes:
        """The bytes."""
        return self.data

    def in_memory(self) -> PictureBytes:
        """Itself."""
        return self


def in_memory(picture: Picture) -> Picture:
    """The picture with its bytes read, where it is kept as bytes or made of one that is: such have
    a method of this name.

    Raises:
        UserError: they cannot be read.
    """
    read = getattr(picture, "in_memory", None)
    found: Picture = picture if read is None else read()
    return found


def size_of(picture: Picture) -> tuple[int, int] | None:
    """Width and height of a picture that knows them without being decoded."""
    size: tuple[int, int] | None = picture.size() if isinstance(picture, _Stored) else None
    return size


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an image file, turn as its EXIF orientation says, convert to RGB (alpha on white).

    Raises:
        UserError: it is none of `FORMATS`, damaged, absurdly large, or of values that no 8 bits
            hold.
    """
    from PIL import UnidentifiedImageError

    try:
        with _opened(data) as file:
            return to_rgb(file)
    except UnidentifiedImageError:  # its own words show where in memory the bytes were
        raise UserError(f"{name}: not a readable image (no known format)") from None
    except Exception as error:  # decoders raise anything on damaged data
        said = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise UserError(f"{name}: not a readable image ({said})") from None


def _opened(data: bytes) -> Image.Image:
    """The file's head is read; only the decoders of `FORMATS` that are there are asked."""
    from PIL import Image

    Image.init()
    return Image.open(BytesIO(data), formats=[one for one in FORMATS if one in Image.OPEN])


def to_rgb(picture: Image.Image) -> Image.Image:
    """A Pillow image turned as its EXIF orientation says, in RGB (alpha on white).

    Grey values of more than 8 bits are scaled: integers up to 65,535, fractions up to 1.

    Raises:
        ValueError: its values fit no such range.
    """
    from PIL import Image

    picture = _in_8_bits(_upright(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says. Only that entry is read: Pillow's own `exif_transpose`
    writes all of them again, and fails where one is ill-typed."""
    from PIL import ExifTags, Image

    turns = Image.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata that cannot be read says nothing about pixels that can
        orientation = None
    method = methods.get(orientation) if isinstance(orientation, int) else None
    return picture if method is None else picture.transpose(method)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey pictures of other values than 0 to 255 scaled to these: `convert` would clip."""
    import numpy as np
    from PIL import Image

    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    sixteen = picture.mode.startswith("I;16")
    values_hw = np.asarray(picture.convert(picture.mode[0]), dtype=np.float32)
    low, high = float(values_hw.min()), float(values_hw.max())
    if not (low >= 0 and high <= 65_535):  # nor if they are no numbers
        raise ValueError(f"values from {low:g} to {high:g}; save it with 8 or 16 bits")
    if picture.mode == "F" and high <= 1:
        factor = 255.0
    elif sixteen or high > 255:
        factor = 1 / 257
    else:
        factor = 1.0
    return Image.fromarray((values_hw * factor).round().astype(np.uint8))
