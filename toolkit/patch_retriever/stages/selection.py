"""The stage that chooses every method's setting, and the method, on held-out queries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import patch_retriever
from patch_retriever.backbones.readout import Readout
from patch_retriever.concepts.query import TABLE
from patch_retriever.concepts.scores import CodesOf
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.data import Data
from patch_retriever.features import Features
from patch_retriever.files import write_json
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration, Layer
from patch_retriever.patch.fit import choose_gate
from patch_retriever.patch.methods import Method
from patch_retriever.patch.operators import Subtract
from patch_retriever.patch.sample import sampled_items
from patch_retriever.progress import Progress
from patch_retriever.retrieval.collection import Collection
from patch_retriever.sae.formats import load_sae
from patch_retriever.sae.quality import problem
from patch_retriever.stages.choice import Candidate, choose
from patch_retriever.stages.features import SavedFeatures
from patch_retriever.stages.judging import judge
from patch_retriever.stages.scoring import scored
from patch_retriever.stages.trials import HeldOut, items_and_pairs

NO_CONCEPT = "no concept is selected in any setting"


def load_calibration(
    readout: Readout,
    data: Data,
    features: SavedFeatures,
    sae_folder: Path,
    concepts: Path,
    seed: int,
    layer: str | None = None,
    splits: Sequence[str] = ("calibration",),
    codes: CodesOf = "tokens",
    device: str = "cpu",
    most: int | None = None,
) -> Calibration:
    """What the methods learn from: the items of `splits`, with the finest gate that holds on
    calibration and validation.

    `layer` is where the SAE's activations are from, if not from the readout. Of more splits than
    calibration the concepts are scored anew, on `codes`. Methods are fitted on `device`, with at
    most `most` items of each modality (None: all, and always all where there are so few that they
    are cross-validated).
    """
    fitted_on, held_out = (features(split, {}) for split in ("calibration", "validation"))
    collection = Collection.joined([data.splits[split] for split in splits])
    kinds = collection.kinds()
    asked = {int(kinds[i]) for t in collection.tasks for i in (*t.queries, *t.documents)}
    choice = choose_gate(
        (fitted_on.mean_nd, fitted_on.kinds_n), asked, (held_out.mean_nd, held_out.kinds_n)
    )
    of_items, kinds_n = len(kinds), torch.from_numpy(kinds)
    pairs = [torch.from_numpy(collection.pairs((task.direction,))) for task in collection.tasks]
    bound = most if most is not None and len(splits) == 1 else of_items
    kept_m = sampled_items(kinds_n, pairs, bound, seed)
    if len(kept_m) < of_items:
        collection = collection.subset(kept_m.tolist())

    def patched(layers: Mapping[str, Subtract]) -> Features:
        whole = Features.joined([features(split, layers) for split in splits])
        return whole if len(kept_m) == of_items else whole.rows(kept_m)

    found = patched({})
    sae, table = load_sae(sae_folder), ConceptTable.load(concepts / TABLE)
    if len(splits) > 1:
        table, _ = scored(found, collection, sae, codes, data.about)
    metrics = json.loads((sae_folder / "cfg.json").read_text())["metadata"].get("metrics", {})
    return Calibration(
        site=readout.site,
        features=found,
        sae=sae,
        concepts=table,
        gate=choice.gate,
        seed=seed,
        layer=None if layer is None else Layer(layer, patched),
        device=device,
        of_items=of_items,
        no_gate=choice.note,
        sae_problem=problem(metrics) or "",
        **items_and_pairs(collection),
    )


def select(
    calibration: Calibration,
    held_out: HeldOut,
    readout: Readout,
    folder: Path,
    progress: Progress,
    found: Sequence[Method],
) -> None:
    """Each of `found`'s best setting on held-out queries, and the method that is exported.

    Writes `selection.json` and the chosen method's patch, with its reasons, under `patch/`. A
    setting that selects no concept is not tried; a method without any other is named under
    `left_out`, as is one that cannot be made here.
    """
    choices: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    candidates: list[Candidate] = []
    for method, tried in zip(found, judge(found, held_out, progress), strict=True):
        # of all items it may select nothing where it did of some
        tops = sorted(tried, key=lambda one: -one.outcome.score)
        top = next((one for one in tops if method.make(**one.setting)), None)
        if top is None:
            why = method.left_out or NO_CONCEPT
            left_out.append({"id": method.id, "title": method.title, "why": why})
            continue
        choices.append(
            {
                "id": method.id,
                "method": method.title,
                "needs": method.needs,
                "control": method.control_of is not None,
                "control_of": method.control_of,
                "setting": top.setting,
                "validation_score": top.outcome.score,
                "tried": [one.to_json() for one in tried],
            }
        )
        if method.control_of is None:
            candidates.append(Candidate(method.id, method.title, method.needs, top.outcome))
    choice = choose(candidates, candidates[0].id, calibration.seed)
    chosen = next(one for one in choices if one["id"] == choice.id)
    gate = calibration.gate
    notes = [f"the gate: {calibration.no_gate}"] if calibration.no_gate else []
    if gate is not None and gate.error > 0:
        notes.append(f"the gate takes up to {100 * gate.error:.1f}% of a kind's items for another")
    write_json(
        folder / "selection.json",
        {
            "exported": chosen["method"],
            "exported_id": choice.id,
            "choice": {**choice.to_json(), **held_out.about},
            "gate": None if gate is None else {"margin": gate.margin, "error": gate.error},
            "notes": notes,
            "methods": choices,
            "left_out": left_out,
        },
    )
    method = next(one for one in found if one.id == choice.id)
    save_patch(method, chosen, calibration, readout, folder / "patch")


def save_patch(
    method: Method,
    choice: dict[str, Any],
    calibration: Calibration,
    readout: Readout,
    folder: Path,
    **about: Any,
) -> None:
    """A method's patch in the setting of `choice` (an entry of `methods` in `selection.json`), with
    where it comes from and what else there is to say `about` it."""
    (patch,) = method.make(**choice["setting"])
    values = {**_provenance(patch, calibration, readout, choice), **about}
    replace(patch, about=values).save(folder)


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
        "id": choice["id"],
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
