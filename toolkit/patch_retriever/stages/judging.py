"""What comes of every setting of every method on held-out queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.methods import Method
from patch_retriever.patch.methods.method import Setting
from patch_retriever.progress import Progress
from patch_retriever.retrieval.evaluate import Outcome, evaluate
from patch_retriever.retrieval.metrics import Measure
from patch_retriever.stages.trials import HeldOut, Trial


@dataclass(frozen=True)
class Tried:
    """A setting of a method: its outcome on held-out queries, how many concepts its patch
    subtracts, and how a control's concepts match."""

    setting: Setting
    outcome: Outcome
    concepts: int
    match: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """As an entry of `tried` in `selection.json`."""
        values = {
            "setting": self.setting,
            "validation_score": self.outcome.score,
            "concepts": self.concepts,
        }
        return values if self.match is None else {**values, "match": self.match}


class Judged:
    """A setting of a method in one trial after the other. Its patches, which may be large, are not
    kept; where it selects nothing, the base stands for it."""

    def __init__(self, number: int, setting: Setting) -> None:
        """It is of the `number`-th method of each trial."""
        self.number, self.setting = number, setting
        self._queries: dict[str, list[NDArray[np.int64]]] = {}
        self._values: dict[str, list[NDArray[np.float64]]] = {}
        self._concepts = 0
        self._match: dict[str, float] | None = None
        self._selects = False

    def add(self, trial: Trial, measure: Measure) -> None:
        """Judge it in a trial."""
        patches = trial.methods[self.number].make(**self.setting)
        if patches and not self._selects:
            self._selects = True
            self._concepts, self._match = len(patches[0].strengths), _match(patches)
        nothing = trial.methods[0].make()
        outcome = evaluate(patches or nothing, trial.features, trial.collection, measure)
        for task in trial.collection.tasks:
            numbers_q = np.array(task.queries)
            if trial.numbers_m:
                numbers_q = np.array(trial.numbers_m)[numbers_q]
            self._queries.setdefault(task.name, []).append(numbers_q)
            self._values.setdefault(task.name, []).append(outcome.hits_by_task[task.name])

    def tried(self) -> Tried | None:
        """What came of it; None if it never selected anything."""
        if not self._selects:
            return None
        outcome = Outcome(
            {task: _by_query(self._queries[task], found) for task, found in self._values.items()}
        )
        return Tried(self.setting, outcome, self._concepts, self._match)


def _match(patches: Sequence[Patch]) -> dict[str, float] | None:
    """How the concepts of a control's draws match those of its method."""
    matches = [patch.about["match"] for patch in patches if "match" in patch.about]
    if not matches:
        return None
    return {
        "overlap": max(one["overlap"] for one in matches),
        "energy_ratio": sum(one["energy_ratio"] for one in matches) / len(matches),
    }


def _by_query(
    numbers: Sequence[NDArray[np.int64]], values: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The mean of what every query scored in several trials, (q, m)."""
    if len(numbers) == 1:
        return values[0]
    _, place_v, count_q = np.unique(
        np.concatenate(numbers), return_inverse=True, return_counts=True
    )
    total_qm = np.zeros((len(count_q), values[0].shape[1]))
    np.add.at(total_qm, place_v, np.concatenate(values))
    return total_qm / count_q[:, None]


def judge(found: Sequence[Method], held_out: HeldOut, progress: Progress) -> list[list[Tried]]:
    """What came of every method's settings that select something, in all trials."""
    judged = [
        Judged(number, setting)
        for number, method in enumerate(found)
        if not method.left_out
        for setting in method.grid
    ]
    work = ((trial, one) for trial in held_out.trials for one in judged)
    for trial, one in progress(work, len(held_out.trials) * len(judged)):
        if trial.collection.tasks:
            one.add(trial, held_out.measure)
    tried: list[list[Tried]] = [[] for _ in found]
    for one in judged:
        if (outcome := one.tried()) is not None:
            tried[one.number].append(outcome)
    return tried
