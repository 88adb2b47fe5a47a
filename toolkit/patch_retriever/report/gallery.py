"""Queries that a patch, or any other model, won and lost, with both rankings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patch_retriever.report.pictures import Shown, show
from patch_retriever.retrieval.collection import Collection, Task
from patch_retriever.retrieval.metrics import ranks, search

EXAMPLES = 2
"""Queries shown of those won, and of those lost, in each task."""
TOP = 5
DEPTH = 100
"""Ranks below are not told apart."""


@dataclass(frozen=True)
class Hit:
    """A document of a ranking."""

    shown: Shown
    relevant: bool


@dataclass(frozen=True)
class Side:
    """One of the two rankings of a query: the rank of its best relevant document, the first few."""

    rank: str
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class Example:
    """A query, a document that answers it, and its rankings by base and by the other model."""

    query: Shown
    sought: Shown
    before: Side
    after: Side


@dataclass(frozen=True)
class TaskGallery:
    """Of a task's `queries`: how many are first with the other model only, with base only;
    examples."""

    task: str
    queries: int
    n_won: int
    n_lost: int
    won: tuple[Example, ...]
    lost: tuple[Example, ...]


@dataclass(frozen=True)
class Rankings:
    """A model's rankings of a task: of every query the rank of its best relevant document, more
    than `deepest` where that is lower, and the first documents of some queries."""

    ranks_q: NDArray[np.int64]
    first: Callable[[list[int]], list[list[int]]]
    deepest: int


@dataclass(frozen=True)
class Cast:
    """A task for a page: its name, and its queries and documents by their numbers."""

    name: str
    query: Callable[[int], Shown]
    document: Callable[[int], Shown]
    relevant: Callable[[int], Sequence[int]]
    """Numbers of the documents that answer a query, of which there is one at least."""


Embeddings = Sequence[NDArray[np.float32]]
"""Of all items of a collection, two of (n, d): as queries and as documents."""


def gallery(collection: Collection, base: Embeddings, exported: Embeddings) -> list[TaskGallery]:
    """Every task of a collection with a few of its queries won and lost; ties count against the
    query, as in R@1."""
    seen: dict[int, Shown] = {}

    def shown(number: int) -> Shown:
        if number not in seen:
            seen[number] = show(collection.items[number])
        return seen[number]

    return [
        task_gallery(_cast(task, shown), _rankings(task, base), _rankings(task, exported))
        for task in collection.tasks
    ]


def _cast(task: Task, shown: Callable[[int], Shown]) -> Cast:
    return Cast(
        task.name,
        lambda q: shown(task.queries[q]),
        lambda p: shown(task.documents[p]),
        lambda q: task.relevant[q],
    )


def _rankings(task: Task, embeddings: Embeddings) -> Rankings:
    queries_qd, documents_nd = (
        side[list(items)]
        for side, items in zip(embeddings, (task.queries, task.documents), strict=True)
    )

    def first(chosen: list[int]) -> list[list[int]]:
        return search(queries_qd[chosen], documents_nd, min(TOP, len(documents_nd)))[1].tolist()

    return Rankings(ranks(queries_qd, documents_nd, task.relevant, DEPTH), first, DEPTH)


def task_gallery(cast: Cast, before: Rankings, after: Rankings) -> TaskGallery:
    """A few queries of a task that were won and lost.

    A query is won where a relevant document is first after and not before, lost the other way
    round. Shown are those that moved furthest.
    """
    won, lost = _moved(before.ranks_q, after.ranks_q), _moved(after.ranks_q, before.ranks_q)
    chosen = [*won[:EXAMPLES], *lost[:EXAMPLES]]
    examples = []
    if chosen:
        tops = zip(before.first(chosen), after.first(chosen), strict=True)
        for q, both in zip(chosen, tops, strict=True):
            relevant = cast.relevant(q)
            sides = [
                Side(_rank(side, q), tuple(Hit(cast.document(p), p in relevant) for p in top[:TOP]))
                for side, top in zip((before, after), both, strict=True)
            ]
            examples.append(Example(cast.query(q), cast.document(relevant[0]), *sides))
    n = min(len(won), EXAMPLES)
    return TaskGallery(
        cast.name,
        len(before.ranks_q),
        len(won),
        len(lost),
        tuple(examples[:n]),
        tuple(examples[n:]),
    )


def _rank(rankings: Rankings, q: int) -> str:
    rank = int(rankings.ranks_q[q])
    return f"more than {rankings.deepest}" if rank > rankings.deepest else str(rank)


def _moved(worse_q: NDArray[np.int64], better_q: NDArray[np.int64]) -> list[int]:
    """Queries that are first in `better_q` alone, those furthest down in `worse_q` first."""
    found = np.flatnonzero((better_q == 1) & (worse_q > 1))
    return found[np.argsort(-worse_q[found], kind="stable")].tolist()
