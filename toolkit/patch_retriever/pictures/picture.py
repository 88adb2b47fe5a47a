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
        from PIL import Image

        try:
            with Image.open(BytesIO(self.read())) as file:
                return file.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
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
        except OSError as error:
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
        UserError: it is no image, truncated or absurdly large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data)) as file:
            return to_rgb(file)
    except UnidentifiedImageError:  # its own words show where in memory the bytes were
        raise UserError(f"{name}: not a readable image (no known format)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error})") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """A Pillow image turned as its EXIF orientation says, in RGB (alpha on white)."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # convert() would clip instead of scaling
        picture = picture.point(lambda value: value / 257, "L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
