"""Collections: the items of a split, and the tasks over them that a build fits and chooses by."""

from __future__ import annotations

from collections.abc import Container, Sequence
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

    @classmethod
    def joined(cls, parts: Sequence[Collection]) -> Collection:
        """Several collections as one, their items after each other; tasks of one name are one task
        over the documents of all. One collection stays as it is."""
        if len(parts) == 1:
            return parts[0]
        tasks: dict[str, Task] = {}
        first = 0
        for part in parts:
            for task in part.tasks:
                there = tasks.get(task.name, Task(task.name, task.direction, (), (), ()))
                before = len(there.documents)
                tasks[task.name] = Task(
                    task.name,
                    task.direction,
                    (*there.queries, *(first + q for q in task.queries)),
                    (*there.documents, *(first + d for d in task.documents)),
                    (*there.relevant, *(tuple(before + r for r in rs) for rs in task.relevant)),
                )
            first += len(part.items)
        items = tuple(item for part in parts for item in part.items)
        return cls(" and ".join(part.split for part in parts), items, tuple(tasks.values()))

    def subset(self, items: Sequence[int], asking: Container[int] | None = None) -> Collection:
        """Some items, in the given order, and what is left of the tasks over them.

        A query stays where a relevant document does; with `asking` (item numbers) only if it or one
        of these documents is among them.
        """
        place = {item: i for i, item in enumerate(items)}
        tasks = []
        for task in self.tasks:
            kept = [d for d in task.documents if d in place]
            position = {d: i for i, d in enumerate(kept)}
            queries, relevant = [], []
            for query, answers in zip(task.queries, task.relevant, strict=True):
                left = [d for d in (task.documents[r] for r in answers) if d in position]
                counted = asking is None or any(i in asking for i in (query, *left))
                if query in place and left and counted:
                    queries.append(place[query])
                    relevant.append(tuple(position[d] for d in left))
            if queries:
                documents = tuple(place[d] for d in kept)
                tasks.append(
                    Task(task.name, task.direction, tuple(queries), documents, tuple(relevant))
                )
        return Collection(self.split, tuple(self.items[i] for i in items), tuple(tasks))

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
