"""Tables 2, 3, 5 and 8 of the paper beside what was measured here, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper.settings import SHOWN_TASKS
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import find_task

PAPER: dict[str, Any] = json.loads(Path(__file__).with_name("figures.json").read_text("utf-8"))
"""The paper's figures, their inconsistencies (`marks`, `notes`), and where they are from."""
CUTOFFS = (1, 5, 10)

Results = dict[str, dict[str, Any]]
"""What was measured of a model, by the name of the task, and `removal`."""


def read_results(out: Path, model: str) -> Results:
    """What lies in a run's folder; nothing where nothing was run."""
    files = sorted((out / model / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def render(out: Path | None) -> str:
    """All tables of all models; measured columns are empty where nothing was measured."""
    found = {name: read_results(out, name) if out else {} for name in PAPER["models"]}
    lines = ["# The paper's tables, and the same measured here", "", PAPER["source"], ""]
    lines += [*_legend(found), ""]
    for table in (_table2, _table3, _table5, _table8):
        lines += [*table(found), ""]
    lines += [f"[{mark}] {note}  " for mark, note in PAPER["notes"].items()]
    return "\n".join(lines) + "\n"


def _legend(found: dict[str, Results]) -> list[str]:
    lines = [
        "*paper*: the paper's figure. *here*: measured with these scripts, the official code's "
        "way. Empty: not measured. Letters in brackets: where the paper's own figures disagree, "
        "see below. R@k is hits divided by queries, local pools, in percent."
    ]
    for name, results in found.items():
        how = {(r["weights"], r["dtype"], r["limit"]) for r in results.values()}
        for weights, dtype, limit in sorted(how, key=str):
            trial = "" if limit is None else f"; a trial of {limit} queries a task, no result"
            lines += ["", f"{PAPER['models'][name]} here: {weights} in {dtype}{trial}."]
    return lines


def _table2(found: dict[str, Results]) -> list[str]:
    """Removal at every rank that was tried, each beside a random subspace."""
    rows = []
    for name, title in PAPER["models"].items():
        measured = found[name].get("removal", {}).get("recalls", {})
        for row, label in (("base", "no change"), ("removal", "removal, rank not stated")):
            figures = PAPER["table2"][name][row]
            mark = _mark(f"table2/{name}/{row}")
            here = measured.get("base") if row == "base" else None
            rows.append([title, label, *_cells(figures, mark), *_cells(here)])
        tried = sorted((label for label in measured if label != "base"), key=_rank)
        rows += [[title, label, *[""] * 3, *_cells(measured[label])] for label in tried]
        task = found[name].get("mbeir_mscoco_task3", {}).get("recalls", {})
        for label in ("centring", "ReAlign"):
            rows.append([title, f"{label} instead", *[""] * 3, *_cells(task.get(label))])
    head = ["model", "", *_heads("paper"), *_heads("here")]
    return [
        "## Table 2: the top 1% of concepts by attribution removed (MSCOCO i->t)",
        "",
        "Random subspaces are means over three draws; centring and ReAlign need no SAE.",
        "",
        *_markdown(head, rows),
    ]


def _rank(label: str) -> tuple[int, bool]:
    """Of `removal, rank 4` and `random, rank 4`: these two side by side."""
    return int(label.rpartition(" ")[2]), label.startswith("random")


def _table3(found: dict[str, Results]) -> list[str]:
    """A section for each model: base, ReAlign, and what needs less or can be deployed."""
    frozen = ("ReAlign, support", "centring, frozen", "ReAlign, frozen")
    measured = ("base", "ReAlign", "centring", *frozen)
    lines = [
        "## Table 3: M-BEIR, R@5 (R@10 for Fashion200K and FashionIQ)",
        "",
        "*ReAlign* and *centring* take their statistics from the test queries and the pool "
        "themselves, each side its own (transductive, the official code). *Support*: the queries' "
        "from UniIR's validation queries, in the manner of the paper's text. *Frozen*: from COCO "
        "pictures and captions that are not of the test, by kind of item, as this package "
        "exports it.",
    ]
    head = ["no.", "direction", "dataset", "base, paper", "base, here"]
    head += ["ReAlign, paper", "ReAlign, here", *(f"{name}, here" for name in measured[2:])]
    for name, title in PAPER["models"].items():
        rows = []
        for task, figures in PAPER["table3"].items():
            k = CUTOFFS.index(figures["k"])
            here = found[name].get(task, {}).get("recalls", {})
            cells = [f"{here[row][k]:.2f}" if row in here else "" for row in measured]
            said = [
                f"{value:.2f}{_mark(f'table3/{name}/{task}/{row}')}"
                for row, value in zip(("base", "ReAlign"), figures[name], strict=True)
            ]
            known = find_task(task)
            assert known is not None
            first = [str(figures["number"]), known.direction, known.dataset]
            rows.append([*first, said[0], cells[0], said[1], *cells[1:]])
        averages = _averages(rows) if all(row[4] for row in rows) else [""] * len(measured)
        said = [f"{value:.2f}" for value in PAPER["table3_average"][name]]
        rows.append(["", "", "average", said[0], averages[0], said[1], *averages[1:]])
        lines += ["", f"### {title}", "", *_markdown(head, rows)]
    return lines


def _averages(rows: Sequence[Sequence[str]]) -> list[str]:
    """Of the measured columns that are whole."""
    found = []
    for column in (4, *range(6, len(rows[0]))):
        cells = [row[column] for row in rows]
        found.append(f"{sum(map(float, cells)) / len(cells):.2f}" if all(cells) else "")
    return found


def _table5(found: dict[str, Results]) -> list[str]:
    return [
        "## Table 5: pooling",
        "",
        *_shown(found, "table5", {"last": "last", "max": "max", "min": "min", "mean": "base"}),
    ]


def _table8(found: dict[str, Results]) -> list[str]:
    rows = {name: name for name in ("PCA", "PCA, common axes", "ZCA", "ReAlign", "centring")}
    return [
        "## Table 8: whitening",
        "",
        "The paper does not say how its PCA tells the two sides' axes; here each side has its "
        "own, or both have common ones. Centring (of each side) is what whitening adds to.",
        "",
        *_shown(found, "table8", rows),
    ]


def _shown(found: dict[str, Results], table: str, rows: dict[str, str]) -> list[str]:
    """A row for each task, model and method; `rows` says what a method is called in results."""
    lines = []
    for task in SHOWN_TASKS:
        for name, title in PAPER["models"].items():
            figures = PAPER[table][task].get(name, {})
            here = found[name].get(task, {}).get("recalls", {})
            for row, measured in rows.items():
                said = _cells(figures.get(row), _mark(f"{table}/{name}/{task}/{row}"))
                known = find_task(task)
                assert known is not None
                dataset = f"{known.dataset} {known.direction}"
                lines.append([dataset, title, row, *said, *_cells(here.get(measured))])
    return _markdown(["task", "model", "", *_heads("paper"), *_heads("here")], lines)


def _heads(which: str) -> list[str]:
    return [f"R@{k}, {which}" for k in CUTOFFS]


def _cells(figures: Sequence[float] | None, mark: str = "") -> list[str]:
    if figures is None:
        return [""] * len(CUTOFFS)
    return [f"{value:.2f}{mark}" for value in figures]


def _mark(where: str) -> str:
    mark = PAPER["marks"].get(where)
    return f" [{mark}]" if mark else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
