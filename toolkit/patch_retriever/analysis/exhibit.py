"""An exhibit: one figure or table of the analysis, as rows, plots and the numbers to read first."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patch_retriever.files import write_text
from patch_retriever.report import plots
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap
from patch_retriever.retrieval.statistics import Difference
from patch_retriever.retrieval.metrics import CUTOFFS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
RESULT = "result.json"
AVERAGE = "average"


@dataclass(frozen=True)
class Exhibit:
    """`rows` are the CSV's, `summary` the few to read first, `figures` by the end of their name.

    `note` says what could not be shown and why, in a sentence.
    """

    rows: Sequence[Row]
    summary: Sequence[Row] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    note: str = ""

    def save(self, name: str, folder: Path, of: str) -> None:
        """Write `NAME.csv`, a `NAME*.svg` for each figure, and `result.json`, which says what it
        was made `of`."""
        files = []
        if self.rows:
            files.append(f"{name}.csv")
            write_text(folder / files[0], _csv(self.rows))
        for end, figure in self.figures.items():
            files.append(f"{name}{end}.svg")
            plots.save(figure, folder / files[-1])
        values = {"of": of, "files": files, "summary": list(self.summary), "note": self.note}
        write_text(folder / RESULT, json.dumps(values, indent=1) + "\n")  # columns stay in order


def section(values: Mapping[str, Any]) -> str:
    """A saved exhibit in Markdown: its figures, its summary as a table, its note."""
    figures = [f"![{f}]({f})" for f in values["files"] if f.endswith(".svg")]
    tables = [f"All numbers: [{f}]({f})" for f in values["files"] if f.endswith(".csv")]
    summary = [_markdown(values["summary"])] if values["summary"] else []
    note = [values["note"]] if values["note"] else []
    return "\n\n".join([*figures, *summary, *note, *tables])


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    return buffer.getvalue()


def _markdown(rows: Sequence[Row]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[k]) for k in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Yardstick:
    """What outcomes on a collection are held against: `base`, which is called `name`."""

    base: Outcome
    name: str
    collection: Collection
    seed: int

    @cached_property
    def _bootstrap(self) -> PairedBootstrap:
        return PairedBootstrap({t.name: len(t.queries) for t in self.collection.tasks}, self.seed)

    def rows(self, labels: Row, outcome: Outcome) -> list[Row]:
        """A row for each task and one for their average: recalls, and differences to base in R@1
        and in the score with their 95% intervals."""
        found = []
        for task in self.collection.tasks:
            recalls = outcome.recalls(task.name)
            differences = [
                self._bootstrap.task(outcome, self.base, task.name, k) for k in (0, None)
            ]
            head = {"task": task.name, "direction": task.direction, "queries": len(task.queries)}
            found.append(self._row(labels, head, recalls, differences))
        queries = sum(len(task.queries) for task in self.collection.tasks)
        recalls = np.mean([outcome.recalls(task.name) for task in self.collection.tasks], axis=0)
        differences = [self._bootstrap.average(outcome, self.base, k) for k in (0, None)]
        head = {"task": AVERAGE, "direction": "all", "queries": queries}
        return [*found, self._row(labels, head, recalls, differences)]

    def _row(self, labels: Row, head: Row, recalls: Any, differences: Sequence[Difference]) -> Row:
        row: Row = {**labels, "split": self.collection.split, **head}
        row |= {f"R@{k}": float(r) for k, r in zip(CUTOFFS, recalls, strict=True)}
        row |= {"score": float(np.mean(recalls)), "base": self.name}
        for name, d in zip(("R@1", "score"), differences, strict=True):
            row |= {
                f"{name}_minus_base": d.mean,
                f"{name}_minus_base_low": d.low,
                f"{name}_minus_base_high": d.high,
            }
        return row

    def summary(self, labels: Row, outcome: Outcome) -> Row:
        """One row in percent: R@1/5/10 of the first task of the directions that the paper shows,
        and the score with its difference to base."""
        row: Row = dict(labels)
        for task in self._shown():
            row[task] = "/".join(f"{100 * r:.1f}" for r in outcome.recalls(task))
        d = self._bootstrap.average(outcome, self.base)
        change = f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        return row | {"score": f"{100 * outcome.score:.1f}", "score against base": change}

    def _shown(self) -> list[str]:
        first: dict[str, str] = {}
        for task in self.collection.tasks:
            first.setdefault(task.direction, task.name)
        return [first[d] for d in ("t->i", "i->t", "i->i", "it->i") if d in first]

    def band(
        self, outcome: Outcome, cutoff: int | None = None, tasks: Sequence[str] | None = None
    ) -> Difference:
        """The score (or R@`CUTOFFS[cutoff]`) itself with its interval, on all or some tasks."""
        nothing = Outcome({t: np.zeros_like(h) for t, h in outcome.hits_by_task.items()})
        return self._bootstrap.average(outcome, nothing, cutoff, tasks)


def mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean of several draws, query by query."""
    tasks = outcomes[0].hits_by_task
    return Outcome({t: np.mean([o.hits_by_task[t] for o in outcomes], axis=0) for t in tasks})


def line(name: str, x: Sequence[float], bands: Sequence[Difference], **more: Any) -> plots.Series:
    """A line in percent with its band."""
    y, low, high = ([100 * getattr(d, k) for d in bands] for k in ("mean", "low", "high"))
    return plots.Series(name, x, y, low, high, **more)
