"""Items: what is embedded. An image, a text, or both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.pictures.picture import PICTURE_SUFFIXES, Picture, PictureFile
from patch_retriever.texts import text_fault

Kind = Literal["text", "image", "both"]
KINDS: tuple[Kind, ...] = ("text", "image", "both")
"""What an item holds; a kind's number everywhere is its index here."""


@dataclass(frozen=True)
class Item:
    """An image, a text, or both; perhaps more images than one."""

    text: str | None = None
    picture: Picture | None = None
    more_pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        if self.text is None and self.picture is None:
            raise ValueError("an item needs a text, a picture or both")
        if self.more_pictures and self.picture is None:
            raise ValueError("an item with more pictures needs a first one")

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, in order."""
        return () if self.picture is None else (self.picture, *self.more_pictures)

    @classmethod
    def of(cls, text: str | None, pictures: Sequence[Picture]) -> Item:
        """A text, any number of pictures, or both."""
        return cls(text, pictures[0] if pictures else None, tuple(pictures[1:]))

    @classmethod
    def parse(cls, said: str) -> Item:
        """An item as one word of a command: a picture's path, several (`a.jpg + b.jpg`), a text,
        or a text after pictures (`photo.jpg + a text`).

        What exists as a file or ends like a picture's name is a picture; after the first, one that
        does not exist must be a name without spaces.

        Raises:
            UserError: it is empty.
        """
        if not said.strip():
            raise UserError("an empty item; give a text, a picture's path, or 'photo.jpg + a text'")
        if "+" not in said and not _is_file(said) and (fault := text_fault(said)) is not None:
            raise UserError(f"{fault}; give a text, a picture's path, or 'photo.jpg + a text'")
        pictures: list[PictureFile] = []
        rest = said
        while (found := _first_picture(rest, further=bool(pictures))) is not None:
            path, rest = found
            pictures.append(PictureFile(Path(path)))
        return cls.of(rest.strip() or None, pictures) if pictures else cls(said)

    @property
    def kind(self) -> Kind:
        """`text`, `image` or `both`."""
        if self.picture is None:
            return "text"
        return "image" if self.text is None else "both"

    def content_hash(self) -> str:
        """SHA-256 of what is embedded: the text and the pictures' content.

        Raises:
            UserError: a picture cannot be read.
        """
        first = self.picture and self.picture.content_hash()
        return value_hash([self.text, first, *(p.content_hash() for p in self.more_pictures)])

    def check_picture(self) -> None:
        """Open every picture to find a bad one before any work is done.

        Raises:
            UserError: one cannot be read.
        """
        for picture in self.pictures:
            picture.open()

    def load(self) -> list[dict[str, Any]]:
        """The item for a model with a chat template: a chat of one message, images first.

        Not a bare string, since one that names an image file or an address would be fetched as
        an image.
        """
        content: list[dict[str, Any]] = [
            {"type": "image", "image": picture.open()} for picture in self.pictures
        ]
        if self.text is not None:
            content.append({"type": "text", "text": self.text})
        return [{"role": "user", "content": content}]

    def load_plain(self) -> Any:
        """The item for any sentence-transformers model: a text, a picture, or a dict of both or of
        several pictures."""
        if self.picture is None:
            return {"text": self.text}
        opened: Any = [picture.open() for picture in self.pictures]
        image = opened if self.more_pictures else opened[0]
        if self.text is None and not self.more_pictures:
            return image
        return {"image": image} if self.text is None else {"image": image, "text": self.text}


def _first_picture(said: str, further: bool) -> tuple[str, str] | None:
    """The picture that `said` begins with and what comes after its plus; None if there is none.

    A picture's name may hold a plus, too. A `further` one may hold a space only if it exists.
    """
    ends = [match.span() for match in re.finditer(r"\s*\+\s*", said)]
    for end, start in (*ends, (len(said), len(said))):
        path, rest = said[:end], said[start:]
        named = path.lower().endswith(PICTURE_SUFFIXES)
        if _is_file(path) or (named and not (further and re.search(r"\s", path))):
            return path, rest
    return None


def _is_file(said: str) -> bool:
    try:
        return Path(said).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return False
