"""Batches: every pair in its turn, hard negatives that are wrong, nothing held out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from patch_retriever.adapters.batches import Pairs, captions_of, check_apart, some_of
from patch_retriever.errors import UserError
from patch_retriever.retrieval.collection import Collection
from patch_retriever.scenes.tasks import scenes_collection

COLLECTION = scenes_collection("calibration", 20, 0)


def mined(batch_size=6, seed=0):
    pairs = Pairs(COLLECTION, batch_size, seed)
    vectors = torch.randn(len(COLLECTION.items), 8, generator=torch.Generator().manual_seed(1))
    pairs.mine(vectors, vectors)
    return pairs


def test_every_query_comes_before_any_comes_again():
    pairs = mined(batch_size=5)
    for which, task in enumerate(pairs.tasks):
        drawn = [pairs.batch(turn * len(pairs.tasks) + which) for turn in range(4)]
        queries = [int(b.items_m[p]) for b in drawn for p in b.queries_q]
        assert Counter(queries) == Counter(task.queries)


def test_a_batch_is_of_one_task_and_answers_its_queries():
    pairs = mined()
    for number in range(30):
        batch = pairs.batch(number, 2)
        task = pairs.tasks[number % len(pairs.tasks)]
        queries, documents = batch.items_m[batch.queries_q], batch.items_m[batch.documents_d]
        assert len(documents) == len(queries) * 3
        for n, query in enumerate(queries.tolist()):
            right = {task.documents[r] for r in task.relevant[task.queries.index(query)]}
            assert int(documents[n]) in right
            assert batch.relevant_qd[n].tolist() == [int(d) in right for d in documents]
            # its own hard negatives are wrong for it
            own = documents[len(queries) + 2 * n : len(queries) + 2 * n + 2].tolist()
            assert not set(own) & right


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    a, b, c = mined(), mined(), mined(seed=1)
    a.batch(3, 1)
    assert torch.equal(a.batch(17, 1).items_m, b.batch(17, 1).items_m)
    assert not torch.equal(a.batch(17, 1).items_m, c.batch(17, 1).items_m)


def test_without_pairs_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match="no pairs"):
        Pairs(Collection("training", COLLECTION.items, ()), 4, 0)


def test_a_share_keeps_the_items_and_some_queries():
    half = some_of(COLLECTION, 0.5, 0)
    assert half.items is COLLECTION.items
    for task, whole in zip(half.tasks, COLLECTION.tasks, strict=True):
        assert len(task.queries) == 10
        answers = dict(zip(whole.queries, whole.relevant, strict=True))
        assert all(answers[q] == r for q, r in zip(task.queries, task.relevant, strict=True))


def test_captions_are_of_pictures():
    found = captions_of(COLLECTION, 7)
    assert len(found) == 7
    assert all(item.kind == "image" and text for item, text in found)


def test_pictures_that_are_held_out_are_refused():
    check_apart(COLLECTION, [scenes_collection("test", 20, 0)])
    with pytest.raises(UserError, match=r"\d+ pictures .* calibration split"):
        check_apart(COLLECTION, [COLLECTION])
