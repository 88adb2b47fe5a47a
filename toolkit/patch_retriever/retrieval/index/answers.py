"""Queries to what they find in a saved index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patch_retriever.items import Item
from patch_retriever.retrieval.index.items import Entry
from patch_retriever.retrieval.index.search import SavedIndex

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Encoder, Role


@dataclass(frozen=True)
class Hit:
    """An item that was found; `picture` is the name by which `picture_at` opens it (of several
    pictures the first)."""

    rank: int
    score: float
    id: str
    text: str | None
    picture: str | None

    @classmethod
    def of(cls, rank: int, score: float, entry: Entry) -> Hit:
        """An item of the index, with its rank from 1."""
        return cls(rank, score, entry.id, entry.text, entry.picture)


@dataclass(frozen=True)
class Answer:
    """A query and what it found, best first."""

    query: Item
    hits: tuple[Hit, ...]

    @property
    def asked(self) -> str:
        """The query as it is written on the command line."""
        pictures = [picture.name for picture in self.query.pictures]
        return " + ".join(part for part in (*pictures, self.query.text) if part)

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"query": self.asked, "hits": [vars(hit) for hit in self.hits]}

    def to_lines(self) -> list[str]:
        """A table for a terminal: rank, score, id, text."""
        if not self.hits:
            return ["nothing found"]
        rows = [("rank", "score", "id", "text" if any(hit.text for hit in self.hits) else "")]
        for hit in self.hits:
            rows.append((str(hit.rank), f"{hit.score:.4f}", _line(hit.id), _line(hit.text or "")))
        widest = max(len(name) for _, _, name, _ in rows)
        return [
            f"{rank:>4}  {score:>7}  {name:<{widest}}  {text}".rstrip()
            for rank, score, name, text in rows
        ]


def _line(said: str) -> str:
    """On one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in said).split())


def answer(
    index: SavedIndex,
    encoder: Encoder,
    queries: Sequence[Item],
    k: int,
    settings: Mapping[str, int] | None = None,
    batch_size: int = 64,
) -> list[Answer]:
    """The k best items of `index` for every query, which is encoded in the other role than the
    items were.

    Raises:
        UserError: a query's picture cannot be read, or the index has no such search setting.
    """
    asked_as: Role = "document" if index.manifest.made_by.role == "query" else "query"
    queries_qd = encoder.embed(queries, asked_as, batch_size=batch_size)
    scores_qk, numbers_qk = index.search(queries_qd, k, settings)
    entries = index.items.entries(numbers_qk[numbers_qk >= 0].tolist())
    return [
        Answer(
            query,
            tuple(
                Hit.of(rank, score, entries[number])
                for rank, (score, number) in enumerate(zip(scores, numbers, strict=True), 1)
                if number >= 0
            ),
        )
        for query, scores, numbers in zip(
            queries, scores_qk.tolist(), numbers_qk.tolist(), strict=True
        )
    ]
