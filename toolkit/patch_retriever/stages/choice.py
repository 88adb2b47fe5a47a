"""Which method is exported, by its outcomes on held-out queries: the best, if that is no chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.patch.methods.method import Needs
from patch_retriever.retrieval.evaluate import Outcome
from patch_retriever.retrieval.statistics import Difference, Resamples

_COST: dict[Needs, int] = {"nothing": 0, "unpaired items": 1, "pairs": 2, "training": 3}


@dataclass(frozen=True)
class Candidate:
    """A method in its best setting, and its outcome."""

    id: str
    title: str
    needs: Needs
    outcome: Outcome


@dataclass(frozen=True)
class Choice:
    """The chosen method, the one with the best score, and why the first is not always the second.

    `regret` is what the choice is expected to cost against the best of all methods, in score: the
    mean over bootstrap draws of the best score less the chosen one's.
    """

    id: str
    best: str
    reason: str
    best_minus_base: Difference
    regret: float
    queries: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def choose(candidates: Sequence[Candidate], base: str, seed: int) -> Choice:
    """The best candidate, or one that is as good and needs less.

    If the 95% interval of the best one's score less that of `base` (an id) does not lie above zero,
    it is `base`. Else, of those within one standard error of the best (the one-standard-error rule,
    Breiman et al. 1984) that are told from the base, too, the best of those that need least.
    Differences are paired, by bootstrap over queries.
    """
    sizes = {task: len(hits) for task, hits in candidates[0].outcome.hits_by_task.items()}
    resamples = Resamples(sizes, seed)
    draws = {one.id: resamples.draws(_scores(one.outcome)) for one in candidates}
    by_id = {one.id: one for one in candidates}
    best = max(candidates, key=lambda one: one.outcome.score)

    def against_base(one: Candidate) -> Difference:
        low, high = np.quantile(draws[one.id] - draws[base], (0.025, 0.975))
        mean = one.outcome.score - by_id[base].outcome.score
        return Difference(mean, float(low), float(high))

    def as_good(one: Candidate) -> bool:
        error = float(np.std(draws[best.id] - draws[one.id]))
        return best.outcome.score - one.outcome.score <= error

    above = [one for one in candidates if against_base(one).low > 0]
    if against_base(best).low <= 0:
        chosen = by_id[base]
    else:
        equals = [one for one in above if as_good(one)]
        chosen = min(equals, key=lambda o: (_COST[o.needs], -o.outcome.score))
    if chosen is best:
        reason = "best score"
    elif chosen.id == base:
        reason = f"the best, {best.title}, cannot be told from it"
    else:
        reason = f"within one standard error of the best, {best.title}, and needs less"
    regret = np.max(list(draws.values()), axis=0) - draws[chosen.id]
    return Choice(
        chosen.id, best.id, reason, against_base(best), float(regret.mean()), sum(sizes.values())
    )


def _scores(outcome: Outcome) -> dict[str, NDArray[np.float64]]:
    """The score of every query, by task."""
    return {task: hits_q3.mean(1) for task, hits_q3 in outcome.hits_by_task.items()}
