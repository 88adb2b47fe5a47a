"""The table of a build: every method on every task, grouped by what it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap
from patch_retriever.retrieval.metrics import CUTOFFS
from patch_retriever.retrieval.statistics import Difference


@dataclass(frozen=True)
class Row:
    """One method with its outcome on test."""

    method: str
    needs: str
    setting: dict[str, Any]
    validation: float | None
    """Score on validation, by which its setting was chosen; None for what is not chosen."""
    control: bool
    test: Outcome


@dataclass(frozen=True)
class Table:
    """All rows; differences are to `base` (the chosen readout without a patch)."""

    rows: tuple[Row, ...]
    exported: str
    bootstrap: PairedBootstrap
    left_out: tuple[str, ...] = ()
    """Methods that select no concept here, in any setting."""

    @property
    def base(self) -> Row:
        """The chosen readout without a patch."""
        return next(row for row in self.rows if row.method == BASE)

    def row(self, method: str) -> Row:
        """The row of a method."""
        return next(row for row in self.rows if row.method == method)

    def to_json(self) -> dict[str, Any]:
        """Every number: R@1, 5, 10 by task, with the paired interval of R@1 against base, and
        the score with its interval against base and against the exported choice."""
        chosen = self.row(self.exported)
        return {
            "exported": self.exported,
            "base": self.base.method,
            "left_out": list(self.left_out),
            "queries": {t: len(h) for t, h in self.base.test.hits_by_task.items()},
            "rows": [
                {
                    "method": row.method,
                    "needs": row.needs,
                    "setting": row.setting,
                    "control": row.control,
                    "validation_score": row.validation,
                    "test_score": row.test.score,
                    "score_minus_base": asdict(self.bootstrap.average(row.test, self.base.test)),
                    "score_minus_exported": asdict(self.bootstrap.average(row.test, chosen.test)),
                    "tasks": {
                        task: dict(
                            zip([f"R@{k}" for k in CUTOFFS], row.test.recalls(task), strict=True)
                        )
                        | {
                            f"R@{k}_minus_base": asdict(
                                self.bootstrap.task(row.test, self.base.test, task, i)
                            )
                            for i, k in enumerate(CUTOFFS)
                        }
                        for task in row.test.hits_by_task
                    },
                }
                for row in self.rows
            ],
        }

    def to_text(self) -> str:
        """For a terminal: R@1 of every task and the score with its interval against base."""
        tasks = list(self.base.test.hits_by_task)
        width = max(len(row.method) for row in self.rows) + 4
        lines = [
            " " * width
            + "".join(f"{t.replace('t->i ', ''):>8}" for t in tasks)
            + "   score    against base"
        ]
        for needs in filter(self._of, NEEDS):
            lines.append(f"needs {needs}")
            for row in self._of(needs):
                cells = "".join(f"{100 * row.test.recalls(t)[0]:8.1f}" for t in tasks)
                mark = "> " if row.method == self.exported else "  "
                score = f"{100 * row.test.score:8.1f}    {_interval(self._to_base(row))}"
                lines.append(f"{mark}{row.method:<{width - 2}}{cells}{score}")
        setting = setting_text(self.row(self.exported).setting)
        lines.append(f"> exported: best score on validation ({setting})")
        lines += self._left_out()
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """R@1/5/10 of every task, with the 95% interval of the change of R@1 against base."""
        tasks = list(self.base.test.hits_by_task)
        head = ["method", *tasks, "score", "score against base"]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for needs in filter(self._of, NEEDS):
            lines.append(f"| *needs {needs}* |" + " |" * (len(head) - 1))
            for row in self._of(needs):
                name = f"**{row.method}** (exported)" if row.method == self.exported else row.method
                cells = [self._cell(row, task) for task in tasks]
                score = [f"{100 * row.test.score:.1f}", _interval(self._to_base(row))]
                lines.append(f"| {' | '.join([name + _setting_note(row), *cells, *score])} |")
        if self.left_out:
            lines += ["", *self._left_out()]
        return "\n".join(lines)

    def _left_out(self) -> list[str]:
        names = ", ".join(self.left_out)
        return [f"left out, no concept is selected in any setting: {names}"] if names else []

    def _cell(self, row: Row, task: str) -> str:
        recalls = "/".join(f"{100 * r:.1f}" for r in row.test.recalls(task))
        if row.method == self.base.method:
            return recalls
        return f"{recalls} {_interval(self.bootstrap.task(row.test, self.base.test, task))}"

    def _of(self, needs: str) -> list[Row]:
        return [row for row in self.rows if row.needs == needs]

    def _to_base(self, row: Row) -> Difference:
        return self.bootstrap.average(row.test, self.base.test)

    def better_than_exported(self) -> list[Row]:
        """Rows whose score on test is significantly above the exported choice's."""
        chosen = self.row(self.exported).test
        return [r for r in self.rows if self.bootstrap.average(r.test, chosen).low > 0]


BASE = "base, chosen readout"
NEEDS = ("nothing", "unpaired items", "pairs", "training")
EXPLANATION = """\
R@k is the share of queries with a relevant document among the first k, ties counted against the
query. The score is the mean of R@1, R@5 and R@10 over all columns; choices (readout, settings,
the exported method) were made by it on validation, and the numbers are from test. Brackets are
95% intervals of the paired difference to the base in the chosen readout (bootstrap over queries,
1,000 draws). Rows marked random are controls: means over three draws, never chosen."""


def _interval(d: Difference) -> str:
    return f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"


def setting_text(setting: dict[str, Any]) -> str:
    """A method's setting in words."""
    return ", ".join(f"{k} {v}" for k, v in setting.items()) or "no settings"


def _setting_note(row: Row) -> str:
    return f" ({setting_text(row.setting)})" if row.setting else ""
