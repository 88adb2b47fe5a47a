"""Patches judged on the tasks of a split, and compared query by query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patch_retriever.features import Features
from patch_retriever.patch.artefact import Patch
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.metrics import Measure, hits, ranks
from patch_retriever.retrieval.statistics import Difference, Resamples


@dataclass(frozen=True)
class Outcome:
    """Hits of one method on every task: `hits_by_task[task]` is (q, 3), for R@1, 5, 10; or what its
    queries score by another measure, (q, m).

    Controls that are drawn at random hold the mean over their draws.
    """

    hits_by_task: dict[str, NDArray[np.float64]]

    @property
    def score(self) -> float:
        """What choices are made by: the mean of R@1, R@5 and R@10 (or of another measure) over all
        tasks."""
        return float(np.mean([h.mean() for h in self.hits_by_task.values()]))

    def recalls(self, task: str) -> tuple[float, float, float]:
        """R@1, R@5, R@10 of a task."""
        r1, r5, r10 = self.hits_by_task[task].mean(0)
        return float(r1), float(r5), float(r10)


def evaluate(
    patches: Sequence[Patch],
    features: Features | Callable[[Patch], Features],
    collection: Collection,
    measure: Measure = hits,
) -> Outcome:
    """Mean outcome of `patches` (several only for random controls) on a collection's tasks.

    `features` are those of its items, or give them for a patch: a patch of layers has its own.
    """
    total: dict[str, NDArray[np.float64]] = {}
    for patch in patches:
        found = features(patch) if callable(features) else features
        queries_ne, documents_ne = (side.numpy() for side in patch.embed_both(found))
        outcome = evaluate_embeddings(queries_ne, documents_ne, collection, measure)
        for name, hit in outcome.hits_by_task.items():
            total[name] = total.get(name, 0) + hit / len(patches)
    return Outcome(total)


def evaluate_embeddings(
    as_query_nd: NDArray[np.float32],
    as_document_nd: NDArray[np.float32],
    collection: Collection,
    measure: Measure = hits,
) -> Outcome:
    """Outcome of embeddings of all of a collection's items, as queries and as documents."""
    return Outcome(
        {
            task.name: measure(
                ranks(
                    as_query_nd[list(task.queries)],
                    as_document_nd[list(task.documents)],
                    task.relevant,
                    depth=len(task.documents),
                ),
                len(task.documents),
            )
            for task in collection.tasks
        }
    )


def evaluate_pooled(pooled_nd: Tensor, collection: Collection) -> Outcome:
    """Outcome of pooled vectors as they are, normalised; the same for queries and documents."""
    unit_nd = torch.nn.functional.normalize(pooled_nd, dim=1).numpy()
    return evaluate_embeddings(unit_nd, unit_nd, collection)


class PairedBootstrap(Resamples):
    """Paired bootstrap over the queries of a build's tasks: outcomes compared with each other."""

    def task(self, a: Outcome, b: Outcome, task: str, cutoff: int | None = 0) -> Difference:
        """a - b in R@`CUTOFFS[cutoff]` of one task; in the mean of all three for None."""
        return self.average(a, b, cutoff, [task])

    def average(
        self,
        a: Outcome,
        b: Outcome,
        cutoff: int | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Difference:
        """a - b in the score (mean of R@1, 5, 10 over tasks), or in R@`CUTOFFS[cutoff]`; over
        all tasks or some."""
        return self.interval({t: _delta(a, b, t, cutoff) for t in tasks or a.hits_by_task})


def _delta(a: Outcome, b: Outcome, task: str, cutoff: int | None) -> NDArray[np.float64]:
    delta_q3 = a.hits_by_task[task] - b.hits_by_task[task]
    return delta_q3.mean(1) if cutoff is None else delta_q3[:, cutoff]
