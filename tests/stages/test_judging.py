"""What queries scored in several trials, against a loop over all of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from patch_retriever.features import Features
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.methods import Method
from patch_retriever.patch.operators import Affine
from patch_retriever.progress import no_progress
from patch_retriever.retrieval.metrics import hits, log_recall
from patch_retriever.retrieval.pairs import Pair, pairs_collection
from patch_retriever.sae.codes import Codes
from patch_retriever.stages.judging import judge
from patch_retriever.stages.trials import HeldOut, Trial, folds

N, D = 24, 6
PAIRS = [
    Pair(SimpleNamespace(name=f"p{i}", content_hash=lambda i=i: f"p{i}"), f"text {i}", f"p{i}")
    for i in range(N)
]
COLLECTION = pairs_collection("calibration", PAIRS)
X_ND = torch.randn(len(COLLECTION.items), D, generator=torch.Generator().manual_seed(0))
FEATURES = Features(
    X_ND,
    X_ND,
    Codes.from_dense(torch.zeros(len(X_ND), 3)),
    torch.from_numpy(COLLECTION.kinds()),
)


def turned(seed):
    """A patch of one linear map."""
    weight = torch.randn(1, D, D, generator=torch.Generator().manual_seed(seed))
    step = Affine(f"turn {seed}", "all", weight, torch.zeros(1, D))
    return Patch("last_hidden_state", maps=(step,))


def methods(fold):
    """The base, one that turns otherwise in every fold, one that selects something in fold 1 alone,
    and one that never does."""
    yield Method("base", "base", "nothing", lambda: [Patch("last_hidden_state")])
    grid = ({"seed": 1}, {"seed": 2})
    yield Method("turned", "turned", "pairs", lambda seed: [turned(seed + 10 * fold)], grid)
    yield Method("rare", "rare", "pairs", lambda: [turned(3)] if fold == 1 else [])
    yield Method("never", "never", "pairs", list)


def trial_of(part, fold):
    fold_n = folds(COLLECTION, 4, 0, part)
    rows = np.flatnonzero(fold_n == fold)
    return Trial(
        tuple(methods(fold)),
        lambda _: FEATURES.rows(torch.from_numpy(rows)),
        COLLECTION.subset(rows.tolist()),
        tuple(rows.tolist()),
    )


def by_hand(part, fold, task, query, patch):
    """The rank of a query's document among those of its fold, and their number."""
    fold_n = folds(COLLECTION, 4, 0, part)
    documents = [d for d in task.documents if fold_n[d] == fold]
    (answer,) = (task.documents[r] for r in task.relevant[task.queries.index(query)])
    vectors = X_ND @ patch.maps[0].weight_gde[0] if patch.maps else X_ND
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    scores = [float(vectors[query] @ vectors[d]) for d in documents]
    own = scores[documents.index(answer)]
    return 1 + sum(score >= own for score in scores) - 1, len(documents)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_query_scores_the_mean_of_its_trials(repeats):
    trials = [trial_of(part, fold) for part in range(repeats) for fold in range(4)]
    held_out = HeldOut(trials, 4, repeats, log_recall)
    found = judge(tuple(methods(0)), held_out, no_progress)
    assert [len(tried) for tried in found] == [1, 2, 1, 0]
    for tried, patch_of in (
        (found[0][0], lambda _: Patch("last_hidden_state")),
        (found[1][0], lambda fold: turned(1 + 10 * fold)),
        (found[1][1], lambda fold: turned(2 + 10 * fold)),
        (found[2][0], lambda fold: turned(3) if fold == 1 else Patch("last_hidden_state")),
    ):
        for task in COLLECTION.tasks:
            expected = []
            for query in sorted(task.queries):
                areas = []
                for part in range(repeats):
                    fold = int(folds(COLLECTION, 4, 0, part)[query])
                    rank, n = by_hand(part, fold, task, query, patch_of(fold))
                    areas.append(1 - np.log(rank) / np.log(n))
                expected.append(np.mean(areas))
            values = tried.outcome.hits_by_task[task.name]
            assert values.shape == (N, 1)
            np.testing.assert_allclose(values[:, 0], expected, atol=1e-6)
            assert tried.outcome.score <= 1


def test_one_trial_keeps_the_queries_as_they_are():
    trial = Trial(tuple(methods(0)), lambda _: FEATURES, COLLECTION)
    found = judge(trial.methods, HeldOut([trial]), no_progress)
    for task in COLLECTION.tasks:
        assert found[0][0].outcome.hits_by_task[task.name].shape == (N, 3)


def test_a_trial_without_tasks_counts_nothing():
    empty = Trial(
        tuple(methods(0)), lambda _: FEATURES.rows(torch.tensor([0])), COLLECTION.subset([0])
    )
    assert not empty.collection.tasks
    alone, with_empty = (
        judge(tuple(methods(0)), HeldOut(trials, 4, 1, log_recall), no_progress)
        for trials in ([trial_of(0, 0)], [empty, trial_of(0, 0)])
    )
    assert alone[0][0].outcome.score == with_empty[0][0].outcome.score


@pytest.mark.parametrize("n", [2, 14, 100])
def test_log_recall_is_the_area_under_the_recall_over_the_logarithm_of_the_cutoff(n):
    ranks_q = np.random.default_rng(0).integers(1, n + 1, 200)
    cutoffs = np.arange(1, n + 1)
    recalls = [(ranks_q <= k).mean() for k in cutoffs]
    steps = np.diff(np.log(cutoffs)) / np.log(n)
    area = float(np.dot(recalls[:-1], steps))
    assert log_recall(ranks_q, n).mean() == pytest.approx(area, abs=1e-9)
    assert log_recall(np.array([1, n]), n)[:, 0].tolist() == [1, 0]
    # what is no number is never found, even among one document
    assert log_recall(np.array([n + 1]), n)[0, 0] == 0
    assert np.array_equal(hits(ranks_q, n), hits(ranks_q))
