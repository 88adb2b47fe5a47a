"""Which method is exported: never by chance, and the one that needs least among equals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.retrieval.evaluate import Outcome
from patch_retriever.stages.choice import Candidate, choose


def outcome(shares, q=400, tasks=("t->i", "i->t"), flip=0):
    """Hits of every query; the first `share` of the queries are hits, `flip` of them elsewhere."""
    hits = {}
    for task in tasks:
        hit_q3 = np.zeros((q, 3))
        n = round(shares * q)
        hit_q3[:n] = 1
        if flip:
            hit_q3[:flip], hit_q3[n : n + flip] = 0, 1
        hits[task] = hit_q3
    return Outcome(hits)


def candidate(name, needs, share, flip=0):
    return Candidate(name, name.upper(), needs, outcome(share, flip=flip))


BASE = candidate("base", "nothing", 0.5)


def test_the_best_is_taken_where_it_is_told_from_the_others():
    choice = choose(
        [BASE, candidate("cca", "pairs", 0.7), candidate("pca", "pairs", 0.6)], "base", 0
    )
    assert (choice.id, choice.best, choice.reason) == ("cca", "cca", "best score")
    assert choice.regret == pytest.approx(0, abs=1e-9)
    assert choice.best_minus_base.mean == pytest.approx(0.2)
    assert choice.queries == 800


def test_what_cannot_be_told_from_the_base_exports_the_base_and_says_so():
    noise = candidate("leace", "unpaired items", 0.51, flip=60)
    choice = choose([BASE, noise], "base", 0)
    assert (choice.id, choice.best) == ("base", "leace")
    assert "LEACE" in choice.reason and "cannot be told" in choice.reason
    assert choice.best_minus_base.low <= 0 < choice.best_minus_base.mean
    assert choice.regret >= 0.01 - 1e-9


def test_among_equals_the_best_of_those_that_need_least():
    made = [
        BASE,
        candidate("cca", "pairs", 0.7, flip=40),
        candidate("realign", "unpaired items", 0.693),
        candidate("centre", "unpaired items", 0.69, flip=30),
        candidate("standardise", "unpaired items", 0.695, flip=50),
        candidate("far", "nothing", 0.6),
    ]
    choice = choose(made, "base", 0)
    assert (choice.id, choice.best) == ("standardise", "cca")
    assert "needs less" in choice.reason and "CCA" in choice.reason
    assert choose(made[:3], "base", 0).id == "realign"


def test_the_order_of_the_rows_does_not_matter():
    made = [
        BASE,
        candidate("cca", "pairs", 0.7, flip=40),
        candidate("realign", "unpaired items", 0.695),
    ]
    assert choose(made, "base", 3).id == choose(made[::-1], "base", 3).id


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.floats(0.3, 0.8), min_size=1, max_size=5), st.integers(0, 100))
def test_regret_is_the_mean_over_draws_of_the_best_less_the_chosen(shares, seed):
    """By a bootstrap of its own."""
    made = [BASE] + [
        candidate(f"m{i}", "pairs", share, flip=5 * i) for i, share in enumerate(shares)
    ]
    choice = choose(made, "base", seed)
    rng = np.random.default_rng(1)
    scores = {}
    picks = {task: rng.integers(0, 400, (2000, 400)) for task in ("t->i", "i->t")}
    for one in made:
        means = [one.outcome.hits_by_task[t].mean(1)[picks[t]].mean(1) for t in picks]
        scores[one.id] = np.mean(means, axis=0)
    expected = (np.max(list(scores.values()), axis=0) - scores[choice.id]).mean()
    assert choice.regret == pytest.approx(expected, abs=0.004)
