"""A comparison of models as one HTML page that opens anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import patch_retriever
from patch_retriever.report.comparison import (
    EXPLANATION,
    costs,
    metric_name,
    p_text,
    shown_metrics,
)
from patch_retriever.report.figures import Drawn
from patch_retriever.report.gallery import Cast, Rankings, TaskGallery, task_gallery
from patch_retriever.report.pictures import Shown, show
from patch_retriever.report.plots import Interval, intervals, to_svg
from patch_retriever.report.rendering import render
from patch_retriever.retrieval.comparison.result import Against, Comparison, Row
from patch_retriever.retrieval.comparison.trial import Trial
from patch_retriever.retrieval.ranking import DEPTH, positions
from patch_retriever.retrieval.tasks import RetrievalTask

OVERALL = "overall"
LONGEST = 36
"""Letters of a name in a figure."""

Line = tuple[str, Against, str]
"""A metric's name, a row against the base in it, and p as the table shows it."""


def comparison_page(comparison: Comparison) -> str:
    """The page: figures, differences with their intervals, geometry, queries won and lost.

    Raises:
        UserError: a picture cannot be read any more.
    """
    metrics, others = shown_metrics(comparison), comparison.rows[1:]
    against = {row.name: _against(comparison, row, metrics) for row in others}
    return render(
        "comparison.html.jinja",
        title=" and ".join(row.name for row in comparison.rows if row.plain),
        summary=_summary(comparison),
        explanation=EXPLANATION,
        version=patch_retriever.__version__,
        base=comparison.base,
        metrics=[metric_name(m) for m in metrics],
        means=_means(comparison, metrics),
        others=against,
        details={row.name: row for row in others},
        plots=[_figure(against, i, metric_name(m)) for i, m in enumerate(metrics) if others],
        geometry={
            task: [(row, *_geometry(row, task)) for row in comparison.rows]
            for task in comparison.tasks
        },
        k=max(comparison.settings.cutoffs),
        costs=[costs(row) for row in comparison.rows if row.plain],
        galleries=[(row, list(_galleries(comparison, row))) for row in others if row.plain],
    )


def _summary(comparison: Comparison) -> str:
    """The result in a sentence or two, by nDCG at the largest k over all tasks."""
    metric, base = shown_metrics(comparison)[-1], comparison.base
    said = [f"{base.name} reaches {metric_name(metric)} {100 * base.mean(metric):.1f}"]
    for row in comparison.rows[1:]:
        if row.plain:
            d = comparison.against_base(row, metric)[0].difference
            said.append(
                f"{row.name} {100 * row.mean(metric):.1f} ({100 * d.mean:+.1f} "
                f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}])"
            )
    tasks = len(comparison.tasks)
    return f"Over {tasks} task{'s' * (tasks > 1)}, {', '.join(said)}."


def _means(
    comparison: Comparison, metrics: Sequence[str]
) -> dict[str, list[tuple[Row, list[float]]]]:
    """By task: every row with its means."""
    places: dict[str, str | None] = {OVERALL: None} if len(comparison.tasks) > 1 else {}
    places |= {task: task for task in comparison.tasks}
    return {
        name: [(row, [row.mean(m, task) for m in metrics]) for row in comparison.rows]
        for name, task in places.items()
    }


def _against(comparison: Comparison, row: Row, metrics: Sequence[str]) -> dict[str, list[Line]]:
    """By task: a row against the base in every metric."""
    out: dict[str, list[Line]] = {}
    for m in metrics:
        together, by_task = comparison.against_base(row, m)
        if len(by_task) > 1:
            by_task = {OVERALL: together, **by_task}
        for task, found in by_task.items():
            p = found.p if found.p_holm is None else found.p_holm
            out.setdefault(task, []).append((metric_name(m), found, p_text(p)))
    return out


def _figure(against: Mapping[str, dict[str, list[Line]]], i: int, metric: str) -> Drawn:
    """The differences in the i-th metric, a line for each task."""
    groups = [
        (
            _brief(name),
            [
                Interval(*(100 * x for x in (d.mean, d.low, d.high)))
                for lines in by_task.values()
                for d in [lines[i][1].difference]
            ],
        )
        for name, by_task in against.items()
    ]
    tasks = [_brief(task) for task in next(iter(against.values()))]
    height = 1.2 + 0.12 * len(tasks) * (len(groups) + 1) + 0.17 * len(groups)
    figure = intervals(tasks, groups, f"difference in {metric} (points)", (4.6, height))
    caption = "Means with 95% intervals; dotted: no difference."
    return Drawn(f"{metric} against the base", caption, to_svg(figure, f"against{i}"))


def _brief(name: str) -> str:
    """A name that fits in a figure, and that matplotlib does not take for a formula."""
    half = LONGEST // 2
    cut = name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"
    return cut.replace("$", r"\$")


def _geometry(row: Row, task: str) -> tuple[dict[str, object], list[str]]:
    """Figures of geometry, and the shares of kinds in words."""
    found = row.trials[task].figures["geometry"]
    shares = [
        f"{kind}: " + ", ".join(f"{100 * share:.0f}% {name}" for name, share in of.items() if share)
        for kind, of in found["modality_share"].items()
    ]
    return found, shares


def _galleries(comparison: Comparison, row: Row) -> Iterator[TaskGallery]:
    """A few queries of every task that a row won and lost."""
    for label, task in comparison.tasks.items():
        trials = [one.trials[label] for one in (comparison.base, row)]
        named = {c for trial in trials for top in trial.top for c in top}
        named |= {c for judged in task.qrels.values() for c, grade in judged.items() if grade > 0}
        at = positions(task, named)
        before, after = (_rankings(trial, at) for trial in trials)
        yield task_gallery(_cast(label, task, at), before, after)


def _rankings(trial: Trial, at: Mapping[str, int]) -> Rankings:
    def first(chosen: list[int]) -> list[list[int]]:
        return [[at[c] for c in trial.top[q]] for q in chosen]

    return Rankings(np.where(trial.first_q == 0, DEPTH + 1, trial.first_q), first, DEPTH)


def _cast(label: str, task: RetrievalTask, at: Mapping[str, int]) -> Cast:
    def relevant(q: int) -> list[int]:
        judged = task.qrels[task.query_ids[q]]
        return [at[c] for c, grade in judged.items() if grade > 0 and c in at]

    def document(p: int) -> Shown:
        return show(task.candidates[p])

    return Cast(label, lambda q: show(task.queries[q]), document, relevant)
