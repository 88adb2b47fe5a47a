"""The gallery against rankings by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from patch_retriever.items import Item
from patch_retriever.report import gallery as module
from patch_retriever.report.gallery import TOP, gallery
from patch_retriever.retrieval.collection import Collection, Task


def made(seed: int, n: int = 40, q: int = 30) -> Collection:
    rng = np.random.default_rng(seed)
    items = tuple(Item(f"item {i}") for i in range(n + q))
    relevant = tuple(tuple(sorted(rng.choice(n, rng.integers(1, 4), False))) for _ in range(q))
    task = Task("t->t", "t->t", tuple(range(n, n + q)), tuple(range(n)), relevant)
    return Collection("test", items, (task,))


def embedded(seed: int, collection: Collection, d: int = 4):
    rng = np.random.default_rng(seed)
    # few different values, so that there are ties
    return [rng.integers(-1, 2, (len(collection.items), d)).astype(np.float32) for _ in range(2)]


def brute_rank(task: Task, sides, q: int) -> int:
    scores = [float(sides[0][task.queries[q]] @ sides[1][d]) for d in task.documents]
    best = max(scores[p] for p in task.relevant[q])
    wrong = [p for p in range(len(scores)) if p not in task.relevant[q]]
    return 1 + sum(scores[p] >= best for p in wrong)


@pytest.mark.parametrize("seed", range(4))
def test_won_and_lost_are_counted_as_by_brute_force(seed):
    collection = made(seed)
    (task,) = collection.tasks
    base, exported = embedded(10 + seed, collection), embedded(20 + seed, collection)
    ranks = [
        (brute_rank(task, base, q), brute_rank(task, exported, q)) for q in range(len(task.queries))
    ]
    (found,) = gallery(collection, base, exported)
    won = [q for q, (before, after) in enumerate(ranks) if after == 1 < before]
    lost = [q for q, (before, after) in enumerate(ranks) if before == 1 < after]
    assert (found.task, found.queries) == ("t->t", len(task.queries))
    assert (found.n_won, found.n_lost) == (len(won), len(lost))
    won.sort(key=lambda q: -ranks[q][0])
    lost.sort(key=lambda q: -ranks[q][1])
    for examples, queries in ((found.won, won), (found.lost, lost)):
        assert len(examples) == min(len(queries), module.EXAMPLES)
        for example, q in zip(examples, queries, strict=False):
            assert example.query.text == f"item {task.queries[q]}"
            assert example.sought.text == f"item {task.relevant[q][0]}"
            assert (int(example.before.rank), int(example.after.rank)) == ranks[q]


def test_the_first_documents_are_those_of_the_ranking_with_the_relevant_marked():
    collection = made(1)
    (task,) = collection.tasks
    rng = np.random.default_rng(4)
    base, exported = (
        [rng.normal(size=(len(collection.items), 4)).astype(np.float32) for _ in range(2)]
        for _ in range(2)
    )
    (found,) = gallery(collection, base, exported)
    assert found.won and found.lost
    for example in (*found.won, *found.lost):
        q = task.queries.index(int(example.query.text.split()[1]))
        for side, sides in ((example.before, base), (example.after, exported)):
            scores = [float(sides[0][task.queries[q]] @ sides[1][d]) for d in task.documents]
            order = sorted(range(len(scores)), key=lambda p: -scores[p])[:TOP]
            assert [hit.shown.text for hit in side.hits] == [f"item {p}" for p in order]
            assert [hit.relevant for hit in side.hits] == [p in task.relevant[q] for p in order]


def test_ranks_below_the_depth_are_not_told_apart(monkeypatch):
    monkeypatch.setattr(module, "DEPTH", 3)
    collection = made(2)
    base, exported = embedded(1, collection), embedded(2, collection)
    (found,) = gallery(collection, base, exported)
    ranks = {example.before.rank for example in found.won}
    assert ranks == {"more than 3"}


def test_where_nothing_changes_nothing_is_won_or_lost():
    collection = made(3)
    sides = embedded(5, collection)
    (found,) = gallery(collection, sides, sides)
    assert (found.n_won, found.n_lost, found.won, found.lost) == (0, 0, (), ())
