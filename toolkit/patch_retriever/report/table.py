"""The table of a build: every method on every task, grouped by what it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from patch_retriever.patch.methods import BASE
from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap
from patch_retriever.retrieval.metrics import CUTOFFS
from patch_retriever.retrieval.statistics import Difference


@dataclass(frozen=True)
class Row:
    """One method with its outcome on test."""

    id: str
    method: str
    """Its title."""
    needs: str
    test: Outcome
    setting: dict[str, Any] = field(default_factory=dict)
    validation: float | None = None
    """Score on held-out queries, by which its setting was chosen; None for what is not chosen."""
    control_of: str | None = None
    match: dict[str, float] | None = None
    """Of random concepts: how many are selected ones, and their energy as a share of theirs."""
    without: str | None = None
    """The id of the same method without concepts."""

    def about(self) -> dict[str, Any]:
        """Everything but the hits, with the names of the tasks, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "test"}
        return {**values, "tasks": list(self.test.hits_by_task)}


@dataclass(frozen=True)
class Table:
    """All rows; differences are to the base (the chosen readout without a patch).

    `exported` is the id of the exported row, `choice` what held-out queries chose and why (as in
    `selection.json`), `left_out` the methods that were not made, with the reason; `notes` are
    further lines, `sae_problem` says why nothing was made of concepts.
    """

    rows: tuple[Row, ...]
    exported: str
    bootstrap: PairedBootstrap
    choice: dict[str, Any]
    left_out: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    sae_problem: str = ""

    @property
    def base(self) -> Row:
        """The chosen readout without a patch."""
        return self.row(BASE)

    def row(self, row_id: str) -> Row:
        """The row with an id."""
        return next(row for row in self.rows if row.id == row_id)

    def to_json(self) -> dict[str, Any]:
        """Every number: R@1, 5, 10 by task, with the paired interval of R@1 against base, and
        the score with its interval against base, against the exported choice, and against the row's
        controls and the same without concepts."""
        chosen = self.row(self.exported)
        return {
            "exported": chosen.method,
            "exported_id": chosen.id,
            "base": self.base.method,
            "base_id": self.base.id,
            "choice": self.choice,
            "footnotes": self.footnotes(),
            "sae_problem": self.sae_problem,
            "left_out": list(self.left_out),
            "queries": {t: len(h) for t, h in self.base.test.hits_by_task.items()},
            "rows": [
                {
                    "id": row.id,
                    "method": row.method,
                    "needs": row.needs,
                    "setting": row.setting,
                    "control": row.control_of is not None,
                    "control_of": row.control_of,
                    "match": row.match,
                    "validation_score": row.validation,
                    "test_score": row.test.score,
                    "score_minus_base": asdict(self.bootstrap.average(row.test, self.base.test)),
                    "score_minus_exported": asdict(self.bootstrap.average(row.test, chosen.test)),
                    "score_minus_others": {
                        other.id: asdict(self.bootstrap.average(row.test, other.test))
                        for other in self._others(row)
                    },
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
                mark = self._mark(row)
                score = f"{100 * row.test.score:8.1f}    {_interval(self._to_base(row))}"
                lines.append(f"{mark}{row.method:<{width - 2}}{cells}{score}")
        return "\n".join([*lines, *self.footnotes()])

    def _mark(self, row: Row) -> str:
        if row.id == self.exported:
            return "> "
        return "* " if row.id == self.choice["id"] else "  "

    def footnotes(self) -> list[str]:
        """What is exported and why, what the choice may cost, how well controls match, what cannot
        be told apart, and what was left out and why."""
        choice, exported = self.choice, self.row(self.exported)
        where = judged_on(choice)
        why = f"{choice['reason']} on {where}"
        lines = [f"> exported: {why} ({setting_text(exported.setting)})"]
        if self.exported != choice["id"]:
            of_choice = setting_text(self.row(choice["id"]).setting)
            lines = [
                f"> exported: picked by its id ({setting_text(exported.setting)})",
                f"* {where} would have chosen: {why} ({of_choice})",
            ]
        measure = choice.get("measure", "score")
        lines.append(
            f"expected regret of the choice on {where}: {100 * choice['regret']:.1f} points of "
            f"{measure} against the best row ({choice['queries']:,} queries)"
        )
        ids = {row.id for row in self.rows}
        lines += [self._added(row) for row in self.rows if row.without in ids]
        return [*lines, *self._matches(), *self.notes, *left_out_lines(self.left_out)]

    def _others(self, row: Row) -> list[Row]:
        """What a row is to be compared with: the same without concepts, and its controls."""
        return [
            other for other in self.rows if row.without == other.id or other.control_of == row.id
        ]

    def _added(self, row: Row) -> str:
        """What concepts add to a method, in score."""
        found = [
            f"{_interval(self.bootstrap.average(row.test, other.test), 2)} over {other.method}"
            for other in self._others(row)
        ]
        return f"{row.method}: {', '.join(found)}"

    def _matches(self) -> list[str]:
        """How well the concepts of controls match those of the methods that they control for."""
        found = [(row.method, row.match) for row in self.rows if row.match is not None]
        lines = []
        if ratios := [match["energy_ratio"] for _, match in found if not match["overlap"]]:
            lines = [
                f"random concepts: none is a selected one in {len(ratios)} rows; energy "
                f"{min(ratios):.2f} to {max(ratios):.2f} of the selected ones'"
            ]
        return lines + [
            f"{title}: up to {match['overlap']} are selected ones; energy "
            f"{match['energy_ratio']:.2f} of theirs"
            for title, match in found
            if match["overlap"]
        ]

    def to_markdown(self) -> str:
        """R@1/5/10 of every task, with the 95% interval of the change of R@1 against base."""
        tasks = list(self.base.test.hits_by_task)
        head = ["method", *tasks, "score", "score against base"]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for needs in filter(self._of, NEEDS):
            lines.append(f"| *needs {needs}* |" + " |" * (len(head) - 1))
            for row in self._of(needs):
                name = row.method
                if row.id == self.exported:
                    name = f"**{name}** (exported)"
                elif row.id == self.choice["id"]:
                    name = f"{name} (chosen on {judged_on(self.choice)})"
                cells = [self._cell(row, task) for task in tasks]
                score = [f"{100 * row.test.score:.1f}", _interval(self._to_base(row))]
                lines.append(f"| {' | '.join([name + _setting_note(row), *cells, *score])} |")
        lines.append("")
        for line in self.footnotes():
            lines += [line.removeprefix("> ").removeprefix("* "), ""]
        return "\n".join(lines[:-1])

    def _cell(self, row: Row, task: str) -> str:
        recalls = "/".join(f"{100 * r:.1f}" for r in row.test.recalls(task))
        if row.id == BASE:
            return recalls
        return f"{recalls} {_interval(self.bootstrap.task(row.test, self.base.test, task))}"

    def _of(self, needs: str) -> list[Row]:
        return [row for row in self.rows if row.needs == needs]

    def _to_base(self, row: Row) -> Difference:
        return self.bootstrap.average(row.test, self.base.test)


NEEDS = ("nothing", "unpaired items", "pairs", "training")
EXPLANATION = """\
R@k is the share of queries with a relevant document among the first k, ties counted against the
query. The score is the mean of R@1, R@5 and R@10 over all columns; choices (readout, settings,
the exported method) were made by it on held-out queries, and the numbers are from test. Brackets
are 95% intervals of the paired difference to the base in the chosen readout (bootstrap over
queries, 1,000 draws). Rows that say random or shuffled are controls and never chosen; where
concepts are drawn, they are means over three draws."""


def judged_on(choice: dict[str, Any]) -> str:
    """What a choice was made on, in words (`choice` as in `selection.json`)."""
    if choice["folds"] == 1:
        return "validation"
    times = choice.get("repeats", 1)
    return f"{choice['folds']}-fold cross-validation" + (f" ({times} times)" if times > 1 else "")


def left_out_lines(left_out: Iterable[dict[str, str]]) -> list[str]:
    """A line for every reason why methods were left out."""
    by_why: dict[str, list[str]] = {}
    for one in left_out:
        by_why.setdefault(one["why"], []).append(one["title"])
    return [f"left out, {why}: {', '.join(titles)}" for why, titles in by_why.items()]


def _interval(d: Difference, digits: int = 1) -> str:
    mean, low, high = (f"{100 * value:+.{digits}f}" for value in (d.mean, d.low, d.high))
    return f"{mean} [{low}, {high}]"


def setting_text(setting: dict[str, Any]) -> str:
    """A method's setting in words."""
    return ", ".join(f"{k} {v}" for k, v in setting.items()) or "no settings"


def _setting_note(row: Row) -> str:
    return f" ({setting_text(row.setting)})" if row.setting else ""
