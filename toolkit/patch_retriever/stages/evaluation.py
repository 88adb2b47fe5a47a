"""The stages that judge all methods on test, and make the table of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patch_retriever.activations.collect import collect_pooled
from patch_retriever.backbones.readout import PAPER_READOUT
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.files import write_json, write_tensors, write_text
from patch_retriever.patch.methods import BASE, Method
from patch_retriever.patch.methods.adapted import is_refit
from patch_retriever.progress import Progress
from patch_retriever.report.table import Row, Table
from patch_retriever.retrieval.evaluate import (
    Outcome,
    PairedBootstrap,
    evaluate,
    evaluate_pooled,
)
from patch_retriever.stages.fit import Fit

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

_ROWS, _HITS = "rows.json", "hits.safetensors"


def evaluate_on_test(
    fits: Sequence[Fit],
    transformer: Transformer,
    data: Data,
    config: BuildConfig,
    folder: Path,
    progress: Progress,
    picked: str | None = None,
) -> None:
    """All methods of the backbone, and those of an adapted model that `_shown` says, each in the
    setting that was chosen for it, on the test split; writes the rows and the hits of every query.

    `fits` are the backbone's and, where there is an adapter, the adapted model's; `picked` is the
    id of a row that is wanted in any case.
    """
    base = fits[0]
    collection = data.splits["test"]
    paper = replace(PAPER_READOUT, max_tokens=config.max_tokens)
    pooled = collect_pooled(transformer, collection.items, [paper], config.batch_size, progress)
    outcome = evaluate_pooled(pooled[paper], collection)
    rows = [Row("base-paper", "base, the paper's readout", "nothing", outcome)]
    work = [(base, m, c) for m, c in _chosen(base)]
    work += [(one, m, c) for one in fits[1:] for m, c in _shown(one, picked)]
    for one, method, choice in progress(work, len(work)):
        outcome = evaluate(method.make(**choice["setting"]), one.features.of("test"), collection)
        rows.append(
            Row(
                method.id,
                method.title,
                method.needs,
                outcome,
                choice["setting"],
                choice["validation_score"],
                method.control_of,
                next(t for t in choice["tried"] if t["setting"] == choice["setting"]).get("match"),
                method.without,
            )
        )
    if base.calibration.layer is None:
        rebuilt_nd = base.features("test", {}).reconstructed(base.calibration.sae)
        outcome = evaluate_pooled(rebuilt_nd, collection)
        rows.append(
            Row(
                "reconstructed",
                "rebuilt from all concepts",
                "unpaired items",
                outcome,
                control_of=BASE,
            )
        )
    write_json(folder / _ROWS, [row.about() for row in rows])
    tensors = {
        f"{i}/{task}": torch.from_numpy(np.ascontiguousarray(hits))
        for i, row in enumerate(rows)
        for task, hits in row.test.hits_by_task.items()
    }
    write_tensors(folder / _HITS, tensors)


def write_table(
    outcomes: Path, fits: Sequence[Fit], chosen: Fit, exported: str, seed: int, folder: Path
) -> None:
    """The table as JSON, Markdown and text, of what `evaluate_on_test` left in `outcomes`.

    `chosen` is the fit whose choice held-out queries prefer, `exported` the id of what is exported.
    """
    rows = _read_rows(outcomes)
    sizes = {task: len(hits) for task, hits in rows[0].test.hits_by_task.items()}
    selection = chosen.selection
    table = Table(
        tuple(rows),
        exported,
        PairedBootstrap(sizes, seed),
        selection["choice"],
        tuple(fits[0].selection["left_out"]),
        tuple(selection["notes"]),
        fits[0].calibration.sae_problem,
    )
    write_json(folder / "table.json", table.to_json())
    write_text(folder / "table.md", table.to_markdown() + "\n")
    write_text(folder / "table.txt", table.to_text() + "\n")


def _read_rows(outcomes: Path) -> list[Row]:
    from safetensors.numpy import load_file

    hits = load_file(outcomes / _HITS)
    rows = []
    for i, about in enumerate(json.loads((outcomes / _ROWS).read_text())):
        mine = {key.partition("/")[2]: h for key, h in hits.items() if key.startswith(f"{i}/")}
        ordered = {task: mine[task] for task in about.pop("tasks")}
        rows.append(Row(**about, test=Outcome(ordered)))
    return rows


def _chosen(one: Fit) -> list[tuple[Method, dict[str, Any]]]:
    """The methods that were tried, with what was chosen for them."""
    choices = {choice["id"]: choice for choice in one.selection["methods"]}
    return [(m, choices[m.id]) for m in one.methods if m.id in choices]


def _shown(one: Fit, picked: str | None) -> list[tuple[Method, dict[str, Any]]]:
    """Of an adapted model: the adapter alone, with the patch it was trained with, and with the
    patch fitted anew that was chosen (else the best on held-out queries); and what is picked."""
    found = _chosen(one)
    anew = {m.id: c for m, c in found if is_refit(m.id) and m.control_of is None}
    wanted = {one.choice["id"], picked} & set(anew)
    if not wanted - {picked} and anew:
        wanted.add(max(anew, key=lambda method_id: float(anew[method_id]["validation_score"])))
    return [(m, c) for m, c in found if not is_refit(m.id) or m.id in wanted]
