"""The HTML page of a search: every query with what it found, thumbnails inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import patch_retriever
from patch_retriever.errors import UserError
from patch_retriever.files import write_text
from patch_retriever.items import Item
from patch_retriever.pictures.stores import PictureStores
from patch_retriever.report.pictures import Shown, show
from patch_retriever.report.rendering import render
from patch_retriever.retrieval.index.answers import Answer, Hit
from patch_retriever.retrieval.index.search import SavedIndex

SIDE = 224
"""Pixels of a thumbnail's longer side at most."""


@dataclass(frozen=True)
class _Found:
    rank: int
    score: float
    id: str
    shown: Shown


def write_search_page(path: Path, index: SavedIndex, answers: Sequence[Answer]) -> None:
    """Write the answers to queries as a page.

    Raises:
        UserError: it cannot be written, or a query's picture cannot be read any more.
    """
    stores = PictureStores()
    rows = [
        (
            show(answer.query, SIDE),
            [_Found(h.rank, h.score, h.id, _show(h, stores)) for h in answer.hits],
        )
        for answer in answers
    ]
    page = render(
        "search.html.jinja",
        index=index.folder.name,
        count=len(index),
        model=index.manifest.made_by.model,
        factory=index.manifest.factory,
        rows=rows,
        version=patch_retriever.__version__,
    )
    write_text(path, page)


def _show(hit: Hit, stores: PictureStores) -> Shown:
    """An item; in place of a picture that is not there any more, a line that says so."""
    try:
        picture = None if hit.picture is None else stores.picture_at(hit.picture)
        return show(Item(hit.text, picture), SIDE)
    except UserError as error:
        return Shown(" · ".join(filter(None, (hit.text, str(error)))), None, "")
