"""The stage that judges all methods on test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patch_retriever.activations.collect import collect_pooled
from patch_retriever.backbones.readout import PAPER_READOUT
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.files import write_json, write_text
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods import methods
from patch_retriever.progress import Progress
from patch_retriever.report.table import Row, Table
from patch_retriever.retrieval.evaluate import PairedBootstrap, evaluate, evaluate_pooled
from patch_retriever.stages.features import SavedFeatures

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def evaluate_on_test(
    calibration: Calibration,
    transformer: Transformer,
    data: Data,
    features: SavedFeatures,
    selected: Path,
    config: BuildConfig,
    folder: Path,
    progress: Progress,
) -> None:
    """All methods, each in the setting that validation chose, on the test split; writes the
    table as JSON, Markdown and text."""
    selection = json.loads((selected / "selection.json").read_text())
    chosen = {choice["method"]: choice for choice in selection["methods"]}
    collection = data.splits["test"]
    paper = replace(PAPER_READOUT, max_tokens=config.max_tokens)
    pooled = collect_pooled(transformer, collection.items, [paper], config.batch_size, progress)
    outcome = evaluate_pooled(pooled[paper], collection)
    rows = [Row("base, the paper's readout", "nothing", {}, None, False, outcome)]
    test = features.of("test")
    found = [method for method in methods(calibration) if method.name in chosen]
    for method in progress(found, len(found)):
        choice = chosen[method.name]
        outcome = evaluate(method.make(**choice["setting"]), test, collection)
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
    if calibration.layer is None:
        rebuilt_nd = features("test", {}).reconstructed(calibration.sae)
        outcome = evaluate_pooled(rebuilt_nd, collection)
        rows.append(Row("rebuilt from all concepts", "unpaired items", {}, None, True, outcome))
    sizes = {task.name: len(task.queries) for task in collection.tasks}
    bootstrap = PairedBootstrap(sizes, config.seed)
    table = Table(tuple(rows), selection["exported"], bootstrap, tuple(selection["left_out"]))
    write_json(folder / "table.json", table.to_json())
    write_text(folder / "table.md", table.to_markdown() + "\n")
    write_text(folder / "table.txt", table.to_text() + "\n")
