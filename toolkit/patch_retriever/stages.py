"""The stages of a build, each a function from finished inputs to files in a folder.

They can be called alone; `build` is all of them in their order.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import patch_retriever
from patch_retriever.activations.collect import collect_features, collect_pooled
from patch_retriever.activations.store import Store, StoreSource
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.inputs import ROLES
from patch_retriever.backbones.readout import PAPER_READOUT, Readout, readout_grid
from patch_retriever.concepts.query import TABLE
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.config import BuildConfig
from patch_retriever.data import SPLITS, Data
from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.files import write_json, write_text
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.fit import fit_gate
from patch_retriever.patch.methods import methods
from patch_retriever.progress import Progress
from patch_retriever.report.table import Row, Table
from patch_retriever.retrieval.evaluate import PairedBootstrap, evaluate, evaluate_embeddings
from patch_retriever.sae.convert import with_thresholds, with_unit_rows
from patch_retriever.sae.formats import load_sae, save_sae
from patch_retriever.sae.metrics import measure
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.train import HELD_OUT_TOKENS, train_saes

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
        write_json(folder / "readout.json", {"chosen": PAPER_READOUT.to_json(), "scores": {}})
        return
    validation = data.splits["validation"]
    grid = list(readout_grid(n_layers(transformer.model)))
    pooled = collect_pooled(transformer, validation.items, grid, config.batch_size, progress)
    scores = {}
    for readout, pooled_nd in pooled.items():
        unit_nd = _unit(pooled_nd)
        scores[readout] = evaluate_embeddings(unit_nd, unit_nd, validation).score
    best = max(scores, key=lambda readout: scores[readout])
    write_json(
        folder / "readout.json",
        {"chosen": best.to_json(), "scores": {readout.name: s for readout, s in scores.items()}},
    )


def load_readout(folder: Path) -> Readout:
    """The readout that `choose_readout` chose."""
    return Readout.from_json(json.loads((folder / "readout.json").read_text())["chosen"])


def learn_concepts(
    folder_of_store: Path, readout: Readout, config: BuildConfig, folder: Path, progress: Progress
) -> None:
    """Train the SAE on a store; half of what it sees are the tokens that a last-token readout
    pools."""
    store = Store(folder_of_store)
    if config.sae_from is not None:
        sae, about = adopt_sae(config.sae_from, store)
        return save_sae(sae, folder, about)
    share = 0.5 if readout.pooling == "lasttoken" else 0.0
    settings = config.sae if config.sae.seed is not None else replace(config.sae, seed=config.seed)
    pairs_p2d = None
    if settings.shared != "none":
        pairs_p2d = store.training_pairs()
    (trained,) = train_saes(
        StoreSource(store),
        [settings],
        pooled_share=share,
        pairs_p2d=pairs_p2d,
        role_names=ROLES,
        progress=progress,
    )
    return save_sae(trained.sae, folder, trained.about())


def adopt_sae(
    source: str, store: Store, k: int | None = None
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Somebody's SAE with a threshold per concept and unit rows, and figures of it on a store.

    Raises:
        UserError: it can't be read, or is for activations of another width.
    """
    sae = load_sae(source, k)
    about: dict[str, Any] = {"from": source}
    if sae.d_in != store.d:
        raise UserError(
            f"{source}: an SAE for activations of {sae.d_in} dimensions; the backbone's have "
            f"{store.d}, so it was trained on another model"
        )
    x_nd, roles_n = store.held_out(HELD_OUT_TOKENS)
    if sae.k is not None:
        sae, conversion = with_thresholds(sae, x_nd[::2])
        about["conversion"] = asdict(conversion)
    sae = with_unit_rows(sae)
    about["metrics"] = measure(sae, x_nd[1::2], roles_n[1::2], ROLES).to_json()
    return sae, about


def _unit(pooled_nd: Tensor) -> Any:
    return torch.nn.functional.normalize(pooled_nd, dim=1).numpy()


def collect_splits(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae_folder: Path,
    folder: Path,
    batch_size: int,
    progress: Progress,
) -> None:
    """Pooled vectors and pooled codes of every split, one file each."""
    sae = load_sae(sae_folder).to(next(transformer.parameters()).device)
    for split in SPLITS:
        collection = data.splits[split]
        kinds_n = torch.from_numpy(collection.kinds())
        by_role = split == "calibration"  # what concepts are scored on
        found = collect_features(
            transformer, collection.items, readout, sae, kinds_n, batch_size, progress, by_role
        )
        found.save(folder / f"{split}.safetensors")


def load_calibration(
    readout: Readout, data: Data, features: Path, sae_folder: Path, concepts: Path, seed: int
) -> Calibration:
    """What the methods learn from, and a gate where it holds on validation too."""
    found = Features.load(features / "calibration.safetensors")
    held_out = Features.load(features / "validation.safetensors")
    gate = fit_gate(found.mean_nd, found.kinds_n)
    if gate is not None and not bool((gate.kinds(held_out.mean_nd) == held_out.kinds_n).all()):
        gate = None
    collection = data.splits["calibration"]
    queries = sorted({i for task in collection.tasks for i in task.queries})
    documents = sorted({i for task in collection.tasks for i in task.documents})
    directions = dict.fromkeys(task.direction for task in collection.tasks)
    return Calibration(
        readout.site,
        found,
        load_sae(sae_folder),
        ConceptTable.load(concepts / TABLE),
        gate,
        torch.tensor(queries),
        torch.tensor(documents),
        {direction: torch.from_numpy(collection.pairs((direction,))) for direction in directions},
        seed,
    )


def select(
    calibration: Calibration,
    data: Data,
    features: Path,
    readout: Readout,
    folder: Path,
    progress: Progress,
) -> None:
    """Every method's best setting on validation, and the best method of all.

    Writes `selection.json` and the best method's patch, with its reasons, under `patch/`. A setting
    that selects no concept is not tried; a method without any other is named under `left_out`.
    """
    held_out, collection = (
        Features.load(features / "validation.safetensors"),
        data.splits["validation"],
    )
    choices: list[dict[str, Any]] = []
    left_out: list[str] = []
    best_patch, best_score = None, -1.0
    found = list(methods(calibration))
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
    if patch.subtract is not None:
        scores = vars(calibration.concepts)
        for number, strength in zip(
            patch.subtract.concepts_m.tolist(), patch.subtract.strength_m.tolist(), strict=True
        ):
            entry = {
                name: float(f"{float(score_c[number]):.6g}") for name, score_c in scores.items()
            }
            concepts.append({"concept": number, "strength": float(f"{strength:.6g}"), **entry})
    return {
        "made_by": f"patch-retriever {patch_retriever.__version__}",
        "readout": readout.to_json(),
        "method": choice["method"],
        "needs": choice["needs"],
        "setting": choice["setting"],
        "reason": patch.about.get("reason", ""),
        "concepts": concepts,
    }


def evaluate_on_test(
    calibration: Calibration,
    transformer: Transformer,
    data: Data,
    features: Path,
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
    pooled = collect_pooled(
        transformer, collection.items, [PAPER_READOUT], config.batch_size, progress
    )
    paper = _unit(pooled[PAPER_READOUT])
    rows = [
        Row(
            "base, the paper's readout",
            "nothing",
            {},
            None,
            False,
            evaluate_embeddings(paper, paper, collection),
        )
    ]
    test = Features.load(features / "test.safetensors")
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
    rebuilt = _unit(test.reconstructed(calibration.sae))
    outcome = evaluate_embeddings(rebuilt, rebuilt, collection)
    rows.append(Row("rebuilt from all concepts", "unpaired items", {}, None, True, outcome))
    sizes = {task.name: len(task.queries) for task in collection.tasks}
    bootstrap = PairedBootstrap(sizes, config.seed)
    table = Table(tuple(rows), selection["exported"], bootstrap, tuple(selection["left_out"]))
    write_json(folder / "table.json", table.to_json())
    write_text(folder / "table.md", table.to_markdown() + "\n")
    write_text(folder / "table.txt", table.to_text() + "\n")
