"""Whitening with the statistics of each task's sides, against vectors whitened by hand."""

from __future__ import annotations

import numpy as np
import pytest

from patch_retriever.analysis.finished import open_build
from patch_retriever.analysis.geometry import BY_MODALITY, BY_TASK, fitted
from patch_retriever.patch import fit
from patch_retriever.retrieval.evaluate import evaluate


@pytest.fixture(scope="module")
def build(finished_build):
    return open_build(finished_build)


def test_sides_of_a_task_have_their_own_means(build):
    """Centring by calibration's queries and documents of that task, ranked one by one."""
    found = fitted(build, fit.centre, BY_TASK, "validation")
    known, judged = (build.data.splits[split] for split in ("calibration", "validation"))
    x, y = build.calibration.features.pooled_nd.numpy(), build.validation.pooled_nd.numpy()
    for before, task in zip(known.tasks, judged.tasks, strict=True):
        sides = [
            y[list(getattr(task, side))] - x[list(getattr(before, side))].mean(0)
            for side in ("queries", "documents")
        ]
        q, d = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        same = 0
        for i, relevant in enumerate(task.relevant):
            scores = d @ q[i]
            best = max(scores[j] for j in relevant)
            ahead = sum(s >= best for j, s in enumerate(scores) if j not in relevant)
            expected = [float(ahead < k) for k in (1, 5, 10)]
            same += found.hits_by_task[task.name][i].tolist() == expected
        assert same >= len(task.queries) - 1, task.name  # rounding may break a tie


def test_statistics_per_modality_are_those_of_a_patch(build):
    c = build.calibration
    step = fit.realign(c.vectors().statistics("modality"), 0.3)
    expected = evaluate([build.patch(step)], build.test, build.data.splits["test"])
    found = fitted(build, lambda statistics: fit.realign(statistics, 0.3), BY_MODALITY, "test")
    assert found.score == expected.score
