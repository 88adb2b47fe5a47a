"""Collections: the items of a split, and the tasks over them that a build fits and chooses by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patch_retriever.items import KINDS, Item
from patch_retriever.retrieval.tasks import RetrievalTask

DIRECTIONS = ("t->i", "t->t", "t->it", "i->t", "i->i", "it->t", "it->i", "it->it")


@dataclass(frozen=True)
class Task:
    """One retrieval task over the items of a collection.

    `queries` and `documents` are item numbers; `relevant[q]` are positions in `documents` that
    answer `queries[q]`, every one that fits.
    """

    name: str
    direction: str
    queries: tuple[int, ...]
    documents: tuple[int, ...]
    relevant: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"{self.name}: direction {self.direction!r} is none of {DIRECTIONS}")
        if len(self.relevant) != len(self.queries) or not all(self.relevant):
            raise ValueError(f"{self.name}: every query needs at least one relevant document")


@dataclass(frozen=True)
class Collection:
    """The items of one split and the tasks over them."""

    split: str
    items: tuple[Item, ...]
    tasks: tuple[Task, ...]

    def kinds(self) -> np.ndarray:
        """Each item's kind as its number in `KINDS`, int8 (n,)."""
        return np.array([KINDS.index(item.kind) for item in self.items], dtype=np.int8)

    def pairs(self, directions: Sequence[str] = DIRECTIONS) -> np.ndarray:
        """(query item, first relevant document item) of all tasks in `directions`, int64 (n, 2)."""
        found = [
            (query, task.documents[relevant[0]])
            for task in self.tasks
            if task.direction in directions
            for query, relevant in zip(task.queries, task.relevant, strict=True)
        ]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def retrieval_tasks(self) -> tuple[RetrievalTask, ...]:
        """The tasks by themselves; an item's id is its number in the collection."""
        return tuple(self._retrieval_task(task) for task in self.tasks)

    def _retrieval_task(self, task: Task) -> RetrievalTask:
        query_ids, candidate_ids = map(str, task.queries), tuple(map(str, task.documents))
        return RetrievalTask(
            name=task.name,
            split=self.split,
            direction=task.direction,
            query_ids=tuple(query_ids),
            queries=tuple(self.items[i] for i in task.queries),
            candidate_ids=candidate_ids,
            candidates=tuple(self.items[i] for i in task.documents),
            qrels={
                str(query): {candidate_ids[r]: 1 for r in relevant}
                for query, relevant in zip(task.queries, task.relevant, strict=True)
            },
        )
