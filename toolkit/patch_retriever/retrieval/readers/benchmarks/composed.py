"""What CIRR and FashionIQ share: queries of a reference picture and a text that changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.readers.benchmarks.shared import BadRows
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask


@dataclass(frozen=True)
class Composed:
    """A query: the picture called `reference`, changed as `text` says, is the one called `target`.

    `members` are the candidates of the query where it has a short list of its own.
    """

    where: str
    name: str
    reference: str
    text: str
    target: str
    members: tuple[str, ...] = ()


def existing(pictures: dict[str, Path], listed: Path, bad: BadRows) -> dict[str, Path]:
    """The pictures whose files are there; the others are bad rows of the file that lists them."""
    for name, path in pictures.items():
        if not path.is_file():
            bad.add(f"{listed}: {name}: {path}: no such image file")
    return {name: path for name, path in pictures.items() if path.is_file()}


def usable(
    queries: Sequence[Composed | str], pictures: dict[str, Path], listed: Path, bad: BadRows
) -> list[Composed]:
    """The queries of a file whose pictures are there; a string says what is wrong with one.

    Raises:
        UserError: a bad query, or none is usable.
    """
    kept = []
    for query in queries:
        if isinstance(query, str):
            bad.add(query)
        elif missing := [n for n in (query.reference, query.target) if n not in pictures]:
            bad.add(f"{query.where}: {missing[0]} is not among the pictures of the split")
        else:
            kept.append(query)
    if not kept:
        raise UserError(f"{listed}: no usable query; bad rows: {len(bad.lines)}")
    return kept


def field(entry: Any, name: str) -> str | None:
    """A text in an entry of a JSON list; None where it is not one, or empty."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, str) and value.strip() else None


def composed_task(
    name: str,
    options: ReadOptions,
    queries: Sequence[Composed],
    pictures: dict[str, Path],
    bad: BadRows,
    exclude_reference: bool,
) -> RetrievalTask:
    """it->i over `pictures`; a query with `members` ranks those, less its reference."""
    return RetrievalTask(
        name=name,
        split=options.split,
        direction="it->i",
        query_ids=[query.name for query in queries],
        queries=[Item(q.text, PictureFile(pictures[q.reference])) for q in queries],
        candidate_ids=list(pictures),
        candidates=[Item(picture=PictureFile(path)) for path in pictures.values()],
        qrels={query.name: {query.target: 1} for query in queries},
        excluded=(
            {query.name: frozenset({query.reference}) for query in queries}
            if exclude_reference
            else {}
        ),
        pools={
            q.name: [m for m in q.members if m != q.reference and m in pictures]
            for q in queries
            if q.members
        },
        skipped=bad.lines,
    )
