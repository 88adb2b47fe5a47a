"""A comparison of models: every figure with its interval and tests against the first model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.retrieval.comparison.trial import Trial
from patch_retriever.retrieval.statistics import (
    Difference,
    Resamples,
    Tally,
    holm,
    sign_flip_p,
)
from patch_retriever.retrieval.tasks import RetrievalTask


@dataclass(frozen=True)
class Settings:
    """How models are compared."""

    cutoffs: tuple[int, ...] = (1, 5, 10)
    """k of every metric."""
    index: str = ""
    """A FAISS index to search with; "" compares every pair."""
    prompts: bool = False
    """Put a task's own instructions in place of the model's prompts."""
    baselines: bool = False
    """Centring and ReAlign of the first model, too."""
    seed: int = 0
    """Of the resampling and the sign flips."""
    skip_bad: bool = False
    """Leave items out that cannot be read."""


@dataclass(frozen=True)
class Against:
    """A row against the base in one metric: the mean difference with its 95% interval, p of the
    sign flips, p corrected for the number of tasks (None over all tasks together)."""

    difference: Difference
    p: float
    p_holm: float | None
    tally: Tally

    def to_json(self) -> dict[str, Any]:
        """Flat."""
        values = asdict(self.difference) | {"p": self.p} | asdict(self.tally)
        return values if self.p_holm is None else values | {"p_holm": self.p_holm}


@dataclass(frozen=True)
class Row:
    """A model, or a correction of the first one, on every task."""

    name: str
    """What tables call it."""
    model: str
    """The model as it was named."""
    needs: str
    fingerprint: str
    trials: dict[str, Trial]
    plain: bool
    """Whether it is a model, not one of the baselines."""

    def mean(self, metric: str, task: str | None = None) -> float:
        """Over the queries of a task, or over all tasks, which weigh equally."""
        tasks = [task] if task is not None else list(self.trials)
        return float(np.mean([self.trials[t].metrics[metric].mean() for t in tasks]))

    def deltas(self, base: Row, metric: str) -> dict[str, NDArray[np.float64]]:
        """Its scores less those of `base`, query by query."""
        return {
            t: self.trials[t].metrics[metric] - base.trials[t].metrics[metric] for t in self.trials
        }

    @property
    def encoded(self) -> dict[str, float | int | None]:
        """Items that had to be encoded, the seconds that took, items a second."""
        figures = [trial.figures for trial in self.trials.values()]
        items = sum(f.get("encoded_items", 0) for f in figures)
        seconds = sum(f.get("encode_seconds", 0.0) for f in figures)
        return {
            "items": items,
            "seconds": seconds,
            "items_per_second": items / seconds if seconds else None,
        }


@dataclass(frozen=True)
class Comparison:
    """Rows on the same tasks; the first is the base that the others are compared with."""

    tasks: dict[str, RetrievalTask]
    rows: tuple[Row, ...]
    settings: Settings

    @property
    def base(self) -> Row:
        """What the others are compared with."""
        return self.rows[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics."""
        return tuple(next(iter(self.base.trials.values())).metrics)

    @cached_property
    def _resamples(self) -> Resamples:
        return Resamples(
            {t: len(task.query_ids) for t, task in self.tasks.items()}, self.settings.seed
        )

    @cached_property
    def _known(self) -> dict[tuple[str, str], tuple[Against, dict[str, Against]]]:
        return {}

    def against_base(self, row: Row, metric: str) -> tuple[Against, dict[str, Against]]:
        """A row against the base: over all tasks, and on each."""
        key = (row.name, metric)
        if key not in self._known:  # tables, page and JSON ask for the same
            self._known[key] = self._against_base(row, metric)
        return self._known[key]

    def _against_base(self, row: Row, metric: str) -> tuple[Against, dict[str, Against]]:
        seed, deltas = self.settings.seed, row.deltas(self.base, metric)
        overall = Against(
            self._resamples.interval(deltas),
            sign_flip_p(deltas, seed),
            None,
            Tally.of(np.concatenate(list(deltas.values()))),
        )
        p_values = [sign_flip_p({t: delta_q}, seed) for t, delta_q in deltas.items()]
        return overall, {
            t: Against(self._resamples.interval({t: delta_q}), p, p_holm, Tally.of(delta_q))
            for (t, delta_q), p, p_holm in zip(
                deltas.items(), p_values, holm(p_values), strict=True
            )
        }

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        return {
            "settings": asdict(self.settings),
            "base": self.base.name,
            "tasks": {
                name: {
                    "task": task.name,
                    "split": task.split,
                    "direction": task.direction,
                    "queries": len(task.query_ids),
                    "candidates": len(task.candidate_ids),
                    "skipped": list(task.skipped),
                }
                for name, task in self.tasks.items()
            },
            "rows": [self._row_json(row) for row in self.rows],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        overall: dict[str, Any] = {"metrics": {m: row.mean(m) for m in self.metrics}}
        tasks: dict[str, Any] = {
            t: {"metrics": {m: row.mean(m, t) for m in self.metrics}, **trial.figures}
            for t, trial in row.trials.items()
        }
        if row is not self.base:
            for m in self.metrics:
                together, by_task = self.against_base(row, m)
                overall.setdefault("against_base", {})[m] = together.to_json()
                for t, against in by_task.items():
                    tasks[t].setdefault("against_base", {})[m] = against.to_json()
        return {
            "name": row.name,
            "model": row.model,
            "needs": row.needs,
            "fingerprint": row.fingerprint,
            "encoded": row.encoded,
            "overall": overall,
            "tasks": tasks,
        }
