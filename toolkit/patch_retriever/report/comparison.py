"""A comparison of models for a terminal and for scripts."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import patch_retriever
from patch_retriever.retrieval.comparison.result import Against, Comparison, Row

EXPLANATION = """\
R@k: queries with a relevant candidate among the first k (M-BEIR's recall, a hit rate); equal scores
are ordered as trec_eval does. Differences are to the first model over the same queries, with 95%
intervals (paired bootstrap, 1,000 draws); p is of sign flips, corrected after Holm over the tasks;
won and lost count queries. Overall, tasks weigh equally."""


def shown_metrics(comparison: Comparison) -> list[str]:
    """What the tables show: R@k at every k, nDCG at the largest."""
    cutoffs = comparison.settings.cutoffs
    return [*(f"hit_rate@{k}" for k in cutoffs), f"ndcg@{max(cutoffs)}"]


def metric_name(metric: str) -> str:
    """As tables call it."""
    name, _, k = metric.partition("@")
    said = {"hit_rate": "R", "ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}.get(name, name)
    return f"{said}@{k}" if k else said


def to_text(comparison: Comparison) -> str:
    """A table of every row's means, then one of each row against the base: of a baseline over all
    tasks together, since what is asked of it is whether plain correction would have been enough."""
    blocks = [_means(comparison)]
    blocks += [_against(comparison, row) for row in comparison.rows[1:]]
    if len(comparison.rows) > 1:
        blocks.append(EXPLANATION)
    blocks.append("\n".join(map(costs, (row for row in comparison.rows if row.plain))))
    return "\n\n".join(blocks)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure, with the versions of what computed them."""
    return comparison.to_json() | {"versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version(), "patch-retriever": patch_retriever.__version__}
    for package in ("torch", "transformers", "sentence-transformers", "numpy", "faiss-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _means(comparison: Comparison) -> str:
    metrics = shown_metrics(comparison)
    width = 2 + max(len(name) for name in (*_names(comparison), *comparison.tasks))
    widths = {m: max(9, len(metric_name(m)) + 2) for m in metrics}
    lines = [" " * (width + 2) + "".join(f"{metric_name(m):>{widths[m]}}" for m in metrics)]

    def line(name: str, row: Row, task: str | None) -> str:
        values = "".join(f"{100 * row.mean(m, task):{widths[m]}.1f}" for m in metrics)
        return f"  {name:<{width}}{values}"

    for task, held in comparison.tasks.items():
        queries, candidates = len(held.query_ids), len(held.candidate_ids)
        left_out = f", {len(held.skipped):,} bad left out" if held.skipped else ""
        lines.append(f"{task} ({queries:,} queries, {candidates:,} candidates{left_out})")
        lines += [line(row.name, row, task) for row in comparison.rows]
    if len(comparison.tasks) > 1:
        lines.append(f"overall ({len(comparison.tasks)} tasks)")
        lines += [line(row.name, row, None) for row in comparison.rows]
    return "\n".join(lines)


def _names(comparison: Comparison) -> list[str]:
    return [row.name for row in comparison.rows]


def _against(comparison: Comparison, row: Row) -> str:
    width = 2 + max(len(task) for task in (*comparison.tasks, "overall"))
    needs = f" (needs {row.needs})" if row.needs else ""
    lines = [f"{row.name} against {comparison.base.name}{needs}"]
    counted = "".join(f"{name:>7}" for name in ("won", "lost", "tied"))
    metrics = shown_metrics(comparison)
    wide = 2 + max(7, *(len(metric_name(m)) for m in metrics))
    lines.append(f"  {'task':<{width}}{'metric':<{wide}}{'difference':>24}{'p':>9}{counted}")
    found = {m: comparison.against_base(row, m) for m in metrics}
    several = len(comparison.tasks) > 1
    for task in comparison.tasks if row.plain or not several else ():
        for i, m in enumerate(metrics):
            lines.append(_line(found[m][1][task], "" if i else task, m, width, wide))
    if several:
        for i, m in enumerate(metrics):
            lines.append(_line(found[m][0], "" if i else "overall", m, width, wide))
    return "\n".join(lines)


def _line(against: Against, task: str, metric: str, width: int, wide: int) -> str:
    d, tally = against.difference, against.tally
    change = f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    p = p_text(against.p if against.p_holm is None else against.p_holm)
    counts = f"{tally.won:>7}{tally.lost:>7}{tally.tied:>7}"
    return f"  {task:<{width}}{metric_name(metric):<{wide}}{change:>24}{p:>9}{counts}"


def p_text(p: float) -> str:
    """A p-value in three or four places."""
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def costs(row: Row) -> str:
    """What encoding and searching took."""
    figures = [trial.figures for trial in row.trials.values()]
    rate = row.encoded["items_per_second"]
    items = row.encoded["items"]
    encoded = f"{items:,} items encoded, {rate:,.1f} a second" if rate else "nothing to encode"
    search = sum(f["search_ms_per_query"] for f in figures) / len(figures)
    size = max(f["index_bytes"] for f in figures) / 1e6
    said = f"{row.name}: {encoded}; {search:.2f} ms a query; index up to {size:,.1f} MB"
    recalls = [f["index_recall"] for f in figures if "index_recall" in f]
    if recalls:
        said += f" that finds at least {100 * min(recalls):.1f}% of what an exact search does"
    return said
