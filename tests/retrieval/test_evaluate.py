"""Outcomes of embeddings on tasks, and the paired bootstrap that compares them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.items import Item
from patch_retriever.patch.artefact import DOCUMENT, QUERY
from patch_retriever.retrieval.collection import Collection, Task
from patch_retriever.retrieval.evaluate import (
    Outcome,
    PairedBootstrap,
    evaluate,
    evaluate_embeddings,
)
from patch_retriever.retrieval.statistics import Difference

steady = settings(deadline=None, derandomize=True)


def outcome(**hits_at_1) -> Outcome:
    """An outcome whose hits are the same at every cutoff."""
    return Outcome(
        {task: np.repeat(np.array(h, dtype=float)[:, None], 3, 1) for task, h in hits_at_1.items()}
    )


def coins(n: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_the_score_weighs_tasks_and_cutoffs_equally():
    small = np.array([[0, 1, 1]], dtype=float)
    large = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=float)
    found = Outcome({"small": small, "large": large})
    assert found.score == pytest.approx((2 / 3 + 1 / 12) / 2)
    assert found.recalls("large") == (0, 0, 0.25)


@steady
@given(st.lists(st.booleans(), min_size=1, max_size=50), st.integers(0, 2**32))
def test_identical_outcomes_give_a_zero_interval(found, seed):
    bootstrap = PairedBootstrap({"a": len(found)}, seed, draws=50)
    same = outcome(a=found)
    assert bootstrap.task(same, same, "a") == Difference(0, 0, 0)
    assert bootstrap.average(same, same) == Difference(0, 0, 0)
    assert not bootstrap.average(same, same).significant


@pytest.mark.parametrize(("low", "high", "significant"), [(1, 2, True), (-2, -1, True)])
def test_an_interval_on_one_side_of_zero_is_significant(low, high, significant):
    assert Difference((low + high) / 2, low, high).significant == significant


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (-1, 0)])
def test_an_interval_that_holds_zero_is_not_significant(low, high):
    assert not Difference((low + high) / 2, low, high).significant


def test_a_clear_difference_is_significant_and_has_its_sign():
    better, worse = outcome(a=coins(200, 0.8, 1)), outcome(a=coins(200, 0.4, 2))
    bootstrap = PairedBootstrap({"a": 200}, 0)
    for found in (bootstrap.task(better, worse, "a"), bootstrap.average(better, worse)):
        assert found.significant
        assert 0 < found.low < found.mean < found.high
    back = bootstrap.task(worse, better, "a")
    assert back.high < 0


def test_chance_is_not_significant():
    one, other = outcome(a=coins(200, 0.5, 1)), outcome(a=coins(200, 0.5, 2))
    assert not PairedBootstrap({"a": 200}, 0).task(one, other, "a").significant


def test_pairing_matters():
    before = coins(400, 0.5)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:12]] = 1  # twelve queries more, none lost
    shuffled = np.random.default_rng(1).permutation(after)
    bootstrap = PairedBootstrap({"a": 400}, 0)
    paired = bootstrap.task(outcome(a=after), outcome(a=before), "a")
    unpaired = bootstrap.task(outcome(a=shuffled), outcome(a=before), "a")
    assert paired.mean == pytest.approx(unpaired.mean) == pytest.approx(0.03)
    assert paired.significant
    assert not unpaired.significant
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2


def test_the_interval_is_that_of_the_normal_approximation_where_that_holds():
    one, other = coins(2000, 0.6, 3), coins(2000, 0.5, 4)
    found = PairedBootstrap({"a": 2000}, 0).task(outcome(a=one), outcome(a=other), "a")
    half = 1.96 * (one - other).std() / np.sqrt(2000)
    assert found.mean == pytest.approx((one - other).mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)


def test_queries_are_drawn_within_their_task():
    # every query of each task changes by the same, so only a mixing of tasks could vary
    one = outcome(a=np.ones(10), b=np.zeros(90))
    other = outcome(a=np.zeros(10), b=np.zeros(90))
    bootstrap = PairedBootstrap({"a": 10, "b": 90}, 0)
    found = bootstrap.average(one, other)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert bootstrap.task(one, other, "b") == Difference(0, 0, 0)


def test_the_average_is_over_all_cutoffs_and_a_task_asks_for_one():
    hits_q3 = np.tile([0.0, 1.0, 1.0], (20, 1))
    bootstrap = PairedBootstrap({"a": 20}, 0)
    one, zero = Outcome({"a": hits_q3}), Outcome({"a": np.zeros((20, 3))})
    assert bootstrap.average(one, zero).mean == pytest.approx(2 / 3)
    assert [bootstrap.task(one, zero, "a", cutoff).mean for cutoff in range(3)] == [0, 1, 1]


def test_a_seed_always_gives_the_same_interval():
    one, other = outcome(a=coins(60, 0.6, 5)), outcome(a=coins(60, 0.5, 6))
    found = [PairedBootstrap({"a": 60}, seed).task(one, other, "a") for seed in (7, 7, 8)]
    assert found[0] == found[1] != found[2]


def small_collection() -> Collection:
    """Three items; the first asks for the second, the second for the third."""
    items = tuple(Item(str(i)) for i in range(3))
    tasks = (
        Task("one", "t->t", (0,), (1, 2), ((0,),)),
        Task("two", "t->t", (1,), (0, 2), ((1,),)),
    )
    return Collection("test", items, tasks)


def test_queries_are_read_as_queries_and_documents_as_documents():
    as_query = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=np.float32)
    as_document = np.eye(3, dtype=np.float32)
    found = evaluate_embeddings(as_query, as_document, small_collection())
    assert {name: h[0, 0] for name, h in found.hits_by_task.items()} == {"one": 1, "two": 1}
    swapped = evaluate_embeddings(as_document, as_query, small_collection())
    assert {name: h[0, 0] for name, h in swapped.hits_by_task.items()} == {"one": 0, "two": 0}


def patch_that_embeds(as_query, as_document):
    by_role = {QUERY: as_query, DOCUMENT: as_document}
    return SimpleNamespace(
        embed_both=lambda features: tuple(
            torch.tensor(by_role[r])[features] for r in (QUERY, DOCUMENT)
        )
    )


def test_several_patches_count_with_their_mean():
    shift = np.roll(np.eye(3, dtype=np.float32), 1, axis=1)  # what each item asks for
    finds = patch_that_embeds(shift, np.eye(3, dtype=np.float32))
    misses = patch_that_embeds(-shift, np.eye(3, dtype=np.float32))
    everything = torch.arange(3)

    def at_1(*patches) -> list[float]:
        found = evaluate(patches, everything, small_collection())
        return [h[0, 0] for h in found.hits_by_task.values()]

    assert at_1(finds) == [1, 1]
    assert at_1(misses) == [0, 0]
    assert at_1(finds, misses) == [0.5, 0.5]
    assert at_1(finds, finds, misses, misses, misses) == pytest.approx([0.4, 0.4])
