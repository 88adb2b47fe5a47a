"""Items: what is embedded. An image, a text, or both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.pictures.picture import PICTURE_SUFFIXES, Picture, PictureFile

Kind = Literal["text", "image", "both"]
KINDS: tuple[Kind, ...] = ("text", "image", "both")
"""What an item holds; a kind's number everywhere is its index here."""


@dataclass(frozen=True)
class Item:
    """An image, a text, or both."""

    text: str | None = None
    picture: Picture | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.picture is None:
            raise ValueError("an item needs a text, a picture or both")

    @classmethod
    def parse(cls, said: str) -> Item:
        """An item as one word of a command: a picture's path, `photo.jpg + a text`, or a text.

        What exists as a file or ends like a picture's name is a picture.

        Raises:
            UserError: it is empty.
        """
        if not said.strip():
            raise UserError("an empty item; give a text, a picture's path, or 'photo.jpg + a text'")
        pluses = [match.span() for match in re.finditer(r"\s*\+\s*", said)]
        for end, start in (
            *pluses,
            (len(said), len(said)),
        ):  # a picture's name may hold a plus, too
            path, text = said[:end], said[start:]
            if _is_file(path) or path.lower().endswith(PICTURE_SUFFIXES):
                return cls(text.strip() or None, PictureFile(Path(path)))
        return cls(said)

    @property
    def kind(self) -> Kind:
        """`text`, `image` or `both`."""
        if self.picture is None:
            return "text"
        return "image" if self.text is None else "both"

    def content_hash(self) -> str:
        """SHA-256 of what is embedded: the text and the picture's content.

        Raises:
            UserError: the picture cannot be read.
        """
        return value_hash([self.text, self.picture and self.picture.content_hash()])

    def check_picture(self) -> None:
        """Open the picture, if there is one, to find a bad one before any work is done.

        Raises:
            UserError: it cannot be read.
        """
        if self.picture is not None:
            self.picture.open()

    def load(self) -> list[dict[str, Any]]:
        """The item for a model with a chat template: a chat of one message, image first.

        Not a bare string, since one that names an image file or an address would be fetched as
        an image.
        """
        content = [
            {"type": part, part: value}
            for part, value in self._parts().items()
            if value is not None
        ]
        return [{"role": "user", "content": content}]

    def load_plain(self) -> Any:
        """The item for any sentence-transformers model: a text, a picture, or a dict of both."""
        parts = {part: value for part, value in self._parts().items() if value is not None}
        return parts if "text" in parts else parts["image"]

    def _parts(self) -> dict[str, Any]:
        picture = None if self.picture is None else self.picture.open()
        return {"image": picture, "text": self.text}


def _is_file(said: str) -> bool:
    try:
        return Path(said).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return False
