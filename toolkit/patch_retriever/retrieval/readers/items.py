"""A corpus to encode or to index, from whatever a user keeps it in."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.retrieval.readers.sources import exists, open_source
from patch_retriever.retrieval.readers.sources.rows import IMAGE_COLUMNS, Reading, Row
from patch_retriever.texts import shows, text_fault


@dataclass(frozen=True)
class Corpus:
    """Items by their ids, and one line for every bad row that was left out.

    `items` makes an item when it is asked for one, so that a corpus stays on disk.
    """

    ids: Sequence[str]
    items: Sequence[Item]
    skipped: tuple[str, ...] = ()


def read_corpus(
    source: str | Path,
    skip_bad: bool = False,
    allow_urls: bool = False,
    images: Path | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Corpus:
    """Items from a folder or a file; no picture is opened yet.

    Args:
        source: a folder of pictures (ids are their paths in it), or rows of a text, a picture or
            both, perhaps with an id, in whatever `open_source` opens. An address in a column `url`
            says where a row comes from and is no picture.
        skip_bad: leave out rows that are neither, instead of stopping at the first.
        allow_urls: download pictures that are named by an address.
        images: where relative paths of pictures start, if not beside the file.
        image_column: the column of pictures, where it has none of the names that are known.
        text_column: the column of texts, likewise.

    Raises:
        UserError: there is nothing, a row holds no item, or two rows have the same id.
    """
    reading = Reading.choose(image_column, text_column, images, allow_urls)
    if image_column is None:
        reading = replace(reading, image_columns=tuple(n for n in IMAGE_COLUMNS if n != "url"))
    if not exists(str(source)):
        raise UserError(f"{source}: cannot be read (no such file or folder)")
    opened = open_source(str(source), reading, paired=False)
    keys = array("q")
    ids: dict[str, None] = {}
    skipped: list[str] = []
    for row in opened.rows():
        try:
            _item(row)
            if row.id in ids:
                raise UserError(f"{row.where}: the id {row.id!r} is taken; an id may come once")
        except UserError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
        else:
            ids[row.id] = None
            keys.append(row.key)
    if not keys:
        raise UserError(f'{source}: empty; pictures, or rows with "text" or "image" expected')
    return Corpus(tuple(ids), Lazy(keys, lambda key: _item(opened.row(key))), tuple(skipped))


def _item(row: Row) -> Item:
    if row.fault:
        raise UserError(row.fault)
    if (
        not isinstance(row.text, str | None)
        or row.unusable not in (None, "", [])
        or not (row.text or row.pictures)
    ):
        raise UserError(f'{row.where}: "text", "image" or both expected, as strings')
    text = row.text if row.text and (shows(row.text) or not row.pictures) else None
    if text is not None and (fault := text_fault(text)) is not None:
        raise UserError(f"{row.where}: {fault}")
    return Item.of(text, row.pictures)
