"""The stage that chooses how the backbone is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patch_retriever.activations.collect import collect_pooled
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.readout import PAPER_READOUT, POOLINGS, TRIED, Readout, readout_grid
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.files import write_json
from patch_retriever.progress import Progress
from patch_retriever.retrieval.evaluate import evaluate_pooled

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def choose_readout(
    transformer: Transformer,
    data: Data,
    config: BuildConfig,
    folder: Path,
    progress: Progress,
) -> None:
    """Try every readout of the grid on validation; writes `readout.json` (all scores, the best)."""
    if config.preset == "paper":
        chosen = replace(PAPER_READOUT, max_tokens=config.max_tokens)
        write_json(folder / "readout.json", {"chosen": chosen.to_json(), "scores": {}})
        return
    validation = data.splits["validation"]
    prompts = TRIED if config.prompt is None else (config.prompt,)
    poolings = POOLINGS if config.pooling is None else (config.pooling,)
    layers = n_layers(transformer.model)
    grid = list(readout_grid(layers, prompts, poolings, config.max_tokens))
    pooled = collect_pooled(transformer, validation.items, grid, config.batch_size, progress)
    scores = {}
    for readout, pooled_nd in pooled.items():
        scores[readout] = evaluate_pooled(pooled_nd, validation).score
    best = max(scores, key=lambda readout: scores[readout])
    write_json(
        folder / "readout.json",
        {"chosen": best.to_json(), "scores": {readout.name: s for readout, s in scores.items()}},
    )


def load_readout(folder: Path) -> Readout:
    """The readout that `choose_readout` chose."""
    return Readout.from_json(json.loads((folder / "readout.json").read_text())["chosen"])
