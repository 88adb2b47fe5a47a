"""The stage that judges all methods on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.activations.collect import collect_pooled
from patch_retriever.backbones.readout import PAPER_READOUT
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.files import write_json, write_text
from patch_retriever.patch.methods import Method
from patch_retriever.patch.methods.adapted import ANEW
from patch_retriever.progress import Progress
from patch_retriever.report.table import Row, Table
from patch_retriever.retrieval.evaluate import PairedBootstrap, evaluate, evaluate_pooled
from patch_retriever.stages.fit import Fit, best

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def evaluate_on_test(
    fits: Sequence[Fit],
    transformer: Transformer,
    data: Data,
    config: BuildConfig,
    folder: Path,
    progress: Progress,
) -> None:
    """All methods of the backbone, and those of an adapted model that `_shown` says, each in the
    setting that validation chose, on the test split; writes the table as JSON, Markdown and text.

    `fits` are the backbone's and, where there is an adapter, the adapted model's.
    """
    base = fits[0]
    collection = data.splits["test"]
    paper = replace(PAPER_READOUT, max_tokens=config.max_tokens)
    pooled = collect_pooled(transformer, collection.items, [paper], config.batch_size, progress)
    outcome = evaluate_pooled(pooled[paper], collection)
    rows = [Row("base, the paper's readout", "nothing", {}, None, False, outcome)]
    work = [(base, m, c) for m, c in _chosen(base)]
    work += [(one, m, c) for one in fits[1:] for m, c in _shown(_chosen(one))]
    for one, method, choice in progress(work, len(work)):
        outcome = evaluate(method.make(**choice["setting"]), one.features.of("test"), collection)
        rows.append(
            Row(
                method.name,
                method.needs,
                choice["setting"],
                choice["validation_score"],
                method.control,
                outcome,
            )
        )
    if base.calibration.layer is None:
        rebuilt_nd = base.features("test", {}).reconstructed(base.calibration.sae)
        outcome = evaluate_pooled(rebuilt_nd, collection)
        rows.append(Row("rebuilt from all concepts", "unpaired items", {}, None, True, outcome))
    sizes = {task.name: len(task.queries) for task in collection.tasks}
    bootstrap = PairedBootstrap(sizes, config.seed)
    exported = best(fits).choice["method"]
    table = Table(tuple(rows), exported, bootstrap, tuple(base.selection["left_out"]))
    write_json(folder / "table.json", table.to_json())
    write_text(folder / "table.md", table.to_markdown() + "\n")
    write_text(folder / "table.txt", table.to_text() + "\n")


def _chosen(one: Fit) -> list[tuple[Method, dict[str, Any]]]:
    """The methods that were tried on validation, with what was chosen there."""
    choices = {choice["method"]: choice for choice in one.selection["methods"]}
    return [(m, choices[m.name]) for m in one.methods if m.name in choices]


def _shown(found: list[tuple[Method, dict[str, Any]]]) -> list[tuple[Method, dict[str, Any]]]:
    """Of an adapted model: the adapter alone, with the patch it was trained with, and with the
    patch fitted anew that is best on validation."""
    fixed = [pair for pair in found if not pair[0].name.startswith(ANEW)]
    anew = [pair for pair in found if pair[0].name.startswith(ANEW) and not pair[0].control]
    return [*fixed, *sorted(anew, key=lambda pair: -pair[1]["validation_score"])[:1]]
