"""Rows of a user's own data, before anything about them is checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import Picture, PictureFile
from patch_retriever.pictures.urls import PictureUrl, is_url

IMAGE_COLUMNS = (
    "image",
    "images",
    "file_name",
    "image_path",
    "img",
    "jpg",
    "png",
    "image_url",
    "url",
)
"""Names that a column of pictures has; the first that is there is taken."""
TEXT_COLUMNS = ("text", "caption", "txt", "sentence", "title", "description")
"""Names that a column of texts has."""
ID_COLUMNS = ("id", "__key__")


@dataclass(frozen=True)
class Row:
    """What one line, record or file says.

    - `where`: how errors call it: `pairs.jsonl:3`, `part.parquet:12`, `shard.tar#img/12`.
    - `key`: by which its source finds it again.
    - `id`: its own, or one that its source gives it.
    - `pictures`: none where `unusable` is what stands in their place.
    - `text`: as it stands there, of any type.
    - `fault`: what is wrong with the row as a whole, as an error says it.
    """

    where: str
    key: int
    id: str
    pictures: tuple[Picture, ...] = ()
    text: Any = None
    unusable: Any = None
    fault: str | None = None


class Source(Protocol):
    """Where rows come from. Pictures are not opened, and no picture's bytes are kept."""

    @property
    def containers(self) -> Sequence[Path]:
        """The files that hold pictures inside."""

    def rows(self) -> Iterator[Row]:
        """Every row in order.

        Raises:
            UserError: the source as a whole cannot be read.
        """

    def row(self, key: int) -> Row:
        """The row with this key again; `where` may be less exact."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table, by what they are for."""

    image: str | None
    text: str | None
    id: str | None


@dataclass(frozen=True)
class Reading:
    """How rows are read: what columns are called, where relative paths start, and whether pictures
    may be downloaded."""

    image_columns: tuple[str, ...] = IMAGE_COLUMNS
    text_columns: tuple[str, ...] = TEXT_COLUMNS
    images: Path | None = None
    allow_urls: bool = False

    @classmethod
    def choose(
        cls,
        image_column: str | None = None,
        text_column: str | None = None,
        images: Path | None = None,
        allow_urls: bool = False,
    ) -> Reading:
        """With columns that a user names, in place of the known ones."""
        return cls(
            IMAGE_COLUMNS if image_column is None else (image_column,),
            TEXT_COLUMNS if text_column is None else (text_column,),
            images,
            allow_urls,
        )

    def columns(self, names: Sequence[str], where: str) -> Columns:
        """Which of a table's columns are what.

        Raises:
            UserError: none holds pictures or texts.
        """
        chosen = (self.image_columns, self.text_columns, ID_COLUMNS)
        found = Columns(*(next(_matching(names, wanted), None) for wanted in chosen))
        if found.image is None and found.text is None:
            raise UserError(
                f"{where}: no column for pictures ({', '.join(self.image_columns)}) or texts "
                f"({', '.join(self.text_columns)}); there are {' '.join(', '.join(names).split())}"
            )
        return found

    def row(
        self, where: str, key: int, record: Mapping[str, Any], folder: Path, other_id: str
    ) -> Row:
        """A record with named values that lies in `folder`; `other_id` is for one without an id."""
        own = _value(record, ID_COLUMNS)
        if isinstance(own, float) and own.is_integer():  # how pandas writes integers with gaps
            own = int(own)
        own_id = other_id if own in (None, "") or own != own else str(own)
        text = self.text(record)
        value = _value(record, self.image_columns)
        try:
            pictures = self.pictures(value, folder)
        except UserError as error:
            return Row(where, key, own_id, text=text, fault=f"{where}: {error}")
        if own_id != other_id and not isinstance(own, str | int):
            return Row(where, key, own_id, fault=f"{where}: the id {own!r} is no text or integer")
        return Row(where, key, own_id, pictures, text, None if pictures else value)

    def text(self, record: Mapping[str, Any]) -> Any:
        """What stands where a record has its text."""
        return _value(record, self.text_columns)

    def pictures(self, value: Any, folder: Path) -> tuple[Picture, ...]:
        """The picture at a path or an address, or those of a list; none if one is neither.

        Raises:
            UserError: an address, and they are not allowed.
        """
        found = [self._picture(v, folder) for v in (value if isinstance(value, list) else [value])]
        usable = tuple(picture for picture in found if picture is not None)
        return usable if len(usable) == len(found) else ()

    def _picture(self, value: Any, folder: Path) -> Picture | None:
        if isinstance(value, Mapping):  # as `datasets` writes a picture
            value = value.get("path")
        if not isinstance(value, str) or not value:
            return None
        if is_url(value):
            if not self.allow_urls:
                raise UserError(
                    f"{value}: an address, and pictures are not downloaded unasked; "
                    "download them first or allow it with --allow-urls"
                )
            return PictureUrl(value)
        return PictureFile((self.images or folder) / value)


AS_USUAL = Reading()


def _matching(names: Iterable[str], wanted: Sequence[str]) -> Iterator[str]:
    """Those of `names` that are wanted, whatever their case, the most wanted first."""
    by_lower = {name.lower(): name for name in names}
    return (by_lower[name.lower()] for name in wanted if name.lower() in by_lower)


def _value(record: Mapping[str, Any], wanted: Sequence[str]) -> Any:
    names = _matching(record, wanted)
    return next((record[name] for name in names if record[name] is not None), None)
