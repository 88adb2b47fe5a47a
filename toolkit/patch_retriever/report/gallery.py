"""Queries that the exported patch won and lost on test, with both rankings."""

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
    """A query, a document that answers it, and its rankings by base and by the exported patch."""

    query: Shown
    sought: Shown
    base: Side
    exported: Side


@dataclass(frozen=True)
class TaskGallery:
    """Of a task's `queries`: how many are first with the patch only, with base only; examples."""

    task: str
    queries: int
    n_won: int
    n_lost: int
    won: tuple[Example, ...]
    lost: tuple[Example, ...]


Embeddings = Sequence[NDArray[np.float32]]
"""Of all items of a collection, two of (n, d): as queries and as documents."""


def gallery(collection: Collection, base: Embeddings, exported: Embeddings) -> list[TaskGallery]:
    """Every task of a collection with a few of its queries won and lost.

    A query is won where a relevant document is first with the exported patch and not with base
    (ties count against the query, as in R@1), lost the other way round. Shown are those that
    moved furthest.
    """
    seen: dict[int, Shown] = {}

    def shown(number: int) -> Shown:
        if number not in seen:
            seen[number] = show(collection.items[number])
        return seen[number]

    return [_of_task(task, base, exported, shown) for task in collection.tasks]


def _of_task(
    task: Task, base: Embeddings, exported: Embeddings, shown: Callable[[int], Shown]
) -> TaskGallery:
    sides = [(x[list(task.queries)], y[list(task.documents)]) for x, y in (base, exported)]
    before_q, after_q = (ranks(*side, task.relevant, DEPTH) for side in sides)
    won, lost = _moved(before_q, after_q), _moved(after_q, before_q)
    chosen = [*won[:EXAMPLES], *lost[:EXAMPLES]]
    examples = []
    if chosen:
        first = [search(x[chosen], y, min(TOP, len(y)))[1].tolist() for x, y in sides]
        for q, *tops in zip(chosen, *first, strict=True):
            both = [
                Side(
                    f"more than {DEPTH}" if ranks_q[q] > DEPTH else str(ranks_q[q]),
                    tuple(Hit(shown(task.documents[p]), p in task.relevant[q]) for p in top),
                )
                for ranks_q, top in zip((before_q, after_q), tops, strict=True)
            ]
            sought = shown(task.documents[task.relevant[q][0]])
            examples.append(Example(shown(task.queries[q]), sought, *both))
    n = min(len(won), EXAMPLES)
    return TaskGallery(
        task.name,
        len(task.queries),
        len(won),
        len(lost),
        tuple(examples[:n]),
        tuple(examples[n:]),
    )


def _moved(worse_q: NDArray[np.int64], better_q: NDArray[np.int64]) -> list[int]:
    """Queries that are first in `better_q` alone, those furthest down in `worse_q` first."""
    found = np.flatnonzero((better_q == 1) & (worse_q > 1))
    return found[np.argsort(-worse_q[found], kind="stable")].tolist()
