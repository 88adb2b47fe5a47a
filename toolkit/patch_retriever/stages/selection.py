"""The stage that chooses every method's setting, and the method, on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import patch_retriever
from patch_retriever.backbones.readout import Readout
from patch_retriever.concepts.query import TABLE
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.data import Data
from patch_retriever.features import Features
from patch_retriever.files import write_json
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration, Layer
from patch_retriever.patch.fit import GradedTask, fit_gate
from patch_retriever.patch.methods import Method
from patch_retriever.patch.operators import Subtract
from patch_retriever.patch.sample import renumbered, sampled_items
from patch_retriever.progress import Progress
from patch_retriever.retrieval.evaluate import evaluate
from patch_retriever.sae.formats import load_sae
from patch_retriever.stages.features import SavedFeatures


def load_calibration(
    readout: Readout,
    data: Data,
    features: SavedFeatures,
    sae_folder: Path,
    concepts: Path,
    seed: int,
    layer: str | None = None,
    device: str = "cpu",
    most: int | None = None,
) -> Calibration:
    """What the methods learn from, and a gate where it holds on validation too.

    `layer` is where the SAE's activations are from, if not from the readout; methods are fitted on
    `device`, with at most `most` items of each modality (None: all).
    """
    collection = data.splits["calibration"]
    directions = dict.fromkeys(task.direction for task in collection.tasks)
    pairs = {one: torch.from_numpy(collection.pairs((one,))) for one in directions}
    kinds_n = torch.from_numpy(collection.kinds())
    kept_m = sampled_items(kinds_n, pairs.values(), most or len(kinds_n), seed)

    def patched(layers: Mapping[str, Subtract]) -> Features:
        whole = features("calibration", layers)
        return whole if len(kept_m) == len(kinds_n) else whole.some(kept_m)

    found, held_out = patched({}), features("validation", {})
    gate = fit_gate(found.mean_nd, found.kinds_n)
    if gate is not None and not bool((gate.kinds(held_out.mean_nd) == held_out.kinds_n).all()):
        gate = None
    queries = sorted({i for task in collection.tasks for i in task.queries})
    documents = sorted({i for task in collection.tasks for i in task.documents})
    return Calibration(
        readout.site,
        found,
        load_sae(sae_folder),
        ConceptTable.load(concepts / TABLE),
        gate,
        renumbered(torch.tensor(queries), kept_m),
        renumbered(torch.tensor(documents), kept_m),
        {direction: renumbered(pairs_n2, kept_m) for direction, pairs_n2 in pairs.items()},
        tuple(
            GradedTask.of(t.queries, t.documents, t.relevant).among(kept_m)
            for t in collection.tasks
        ),
        seed,
        None if layer is None else Layer(layer, patched),
        device,
        len(kinds_n),
    )


def select(
    calibration: Calibration,
    data: Data,
    features: SavedFeatures,
    readout: Readout,
    folder: Path,
    progress: Progress,
    found: Sequence[Method],
) -> None:
    """Each of `found`'s best setting on validation, and the best method of all.

    Writes `selection.json` and the best method's patch, with its reasons, under `patch/`. A setting
    that selects no concept is not tried; a method without any other is named under `left_out`.
    """
    held_out, collection = features.of("validation"), data.splits["validation"]
    choices: list[dict[str, Any]] = []
    left_out: list[str] = []
    best_patch, best_score = None, -1.0
    for method in progress(found, len(found)):
        scored = []
        for setting in method.grid:
            patches = method.make(**setting)
            if not patches:
                continue
            scored.append((evaluate(patches, held_out, collection).score, setting))
            if not method.control and scored[-1][0] > best_score:
                (best_patch,), best_score, chosen = patches, scored[-1][0], len(choices)
        if not scored:
            left_out.append(method.name)
            continue
        top, setting = max(scored, key=lambda pair: pair[0])
        choices.append(
            {
                "method": method.name,
                "needs": method.needs,
                "control": method.control,
                "setting": setting,
                "validation_score": top,
                "tried": [{"setting": s, "validation_score": v} for v, s in scored],
            }
        )
    assert best_patch is not None
    exported = choices[chosen]["method"]
    write_json(
        folder / "selection.json",
        {"exported": exported, "methods": choices, "left_out": left_out},
    )
    about = _provenance(best_patch, calibration, readout, choices[chosen])
    replace(best_patch, about=about).save(folder / "patch")


def _provenance(
    patch: Patch, calibration: Calibration, readout: Readout, choice: dict[str, Any]
) -> dict[str, Any]:
    """How a patch was made: readout, method, and every concept with strength, reason and scores."""
    concepts = []
    scores = vars(calibration.concepts)
    for number, strength in patch.strengths.items():
        entry = {name: float(f"{float(score_c[number]):.6g}") for name, score_c in scores.items()}
        concepts.append({"concept": number, "strength": float(f"{strength:.6g}"), **entry})
    return {
        "made_by": f"patch-retriever {patch_retriever.__version__}",
        "readout": readout.to_json(),
        "method": choice["method"],
        "needs": choice["needs"],
        "setting": choice["setting"],
        "reason": patch.about.get("reason", ""),
        "calibration_items": {
            "used": len(calibration.kinds_n),
            "of": calibration.of_items,
        },
        "concepts": concepts,
    }
