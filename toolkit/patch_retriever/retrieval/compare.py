"""Finished models side by side on held-out tasks, as anyone would run them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patch_retriever.backbones.load import BUILT_IN, built_in_model
from patch_retriever.data import SCENES
from patch_retriever.errors import UserError, first_line
from patch_retriever.progress import Say, silent
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.encode import loader
from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap, evaluate_embeddings
from patch_retriever.retrieval.metrics import CUTOFFS
from patch_retriever.retrieval.pairs import pairs_collection, split_pairs
from patch_retriever.retrieval.readers.pairs import read_pairs
from patch_retriever.runs import MARKER, is_ours


def held_out_collection(
    pairs: str, n: int, seed: int, wanted: Sequence[str] = (), skip_bad: bool = False
) -> Collection:
    """The test split of the built-in world or of a user's pairs, with the `wanted` tasks.

    Raises:
        UserError: the pairs cannot be used, or no task has one of the wanted names.
    """
    if pairs == SCENES:
        from patch_retriever.scenes.tasks import scenes_collection

        collection = scenes_collection("test", n, seed)
    else:
        read = read_pairs(pairs, skip_bad)
        collection = pairs_collection("test", split_pairs(read.pairs, seed)["test"])
    names = {name for task in collection.tasks for name in (task.name, task.direction)}
    for name in wanted:
        if name not in names:
            raise UserError(f"no task {name!r} here; there are {', '.join(sorted(names))}")
    tasks = tuple(t for t in collection.tasks if not wanted or {t.name, t.direction} & set(wanted))
    return replace(collection, tasks=tasks)


def build_seed(models: Sequence[str]) -> int:
    """The seed of the first of `models` that `build` made; 0 where there is none."""
    for name in models:
        if is_ours(Path(name)):
            return int(json.loads((Path(name) / MARKER).read_text())["seed"])
    return 0


def load_model(name: str, device: str = "cpu") -> Any:
    """Any sentence-transformers model.

    Raises:
        UserError: there is none of that name, or it does not load.
    """
    from sentence_transformers import SentenceTransformer

    if name == BUILT_IN:
        name = str(built_in_model())
    check_model(name)
    try:
        return SentenceTransformer(name, device=device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{name}: cannot be loaded ({reason})") from error


def check_model(name: str) -> None:
    """Refuse what is plainly no model, before anything is loaded or encoded.

    Raises:
        UserError: no such folder, or no model in it.
    """
    folder = Path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{name}: no such model folder")
    if folder.is_dir() and not (
        {p.name for p in folder.iterdir()} & {"modules.json", "config.json"}
    ):
        raise UserError(
            f"{name}: no model in this folder (modules.json and config.json are missing)"
        )


def compare_models(
    names: Sequence[str],
    collection: Collection,
    seed: int,
    device: str = "cpu",
    batch_size: int = 64,
    say: Say = silent,
) -> dict[str, Any]:
    """Every model's recalls; each after the first with its paired difference to the first."""
    bootstrap = PairedBootstrap({t.name: len(t.queries) for t in collection.tasks}, seed)
    for name in names:
        check_model(name)
    outcomes: list[Outcome] = []
    models = []
    for name in names:
        say(f"encoding with {name}")
        outcomes.append(_outcome(load_model(name, device), collection, batch_size, name))
        tasks = {}
        for task in collection.tasks:
            recalls = outcomes[-1].recalls(task.name)
            tasks[task.name] = dict(zip([f"R@{k}" for k in CUTOFFS], recalls, strict=True))
            if len(outcomes) > 1:
                delta = bootstrap.task(outcomes[-1], outcomes[0], task.name)
                tasks[task.name]["R@1_minus_first"] = asdict(delta)  # type: ignore[assignment]
        models.append({"model": name, "score": outcomes[-1].score, "tasks": tasks})
    return {"queries": {t.name: len(t.queries) for t in collection.tasks}, "models": models}


def _outcome(model: Any, collection: Collection, batch_size: int, name: str) -> Outcome:
    """Encode what the tasks ask for, queries as queries and documents as documents."""
    import numpy as np

    sides = []
    load = loader(model)
    for side, encode in (("queries", model.encode_query), ("documents", model.encode_document)):
        needed = sorted({i for task in collection.tasks for i in getattr(task, side)})
        parts = []
        for start in range(0, len(needed), 8 * batch_size):  # pictures of one chunk in memory
            items = [collection.items[i] for i in needed[start : start + 8 * batch_size]]
            loaded = [load(item) for item in items]
            try:
                encoded = encode(loaded, batch_size=batch_size, show_progress_bar=False)
            except (ValueError, TypeError) as error:
                reason = first_line(error)
                raise UserError(f"{name}: cannot encode these {side} ({reason})") from error
            parts.append(np.asarray(encoded, dtype=np.float32))
        found = np.concatenate(parts)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        out = np.zeros((len(collection.items), found.shape[1]), dtype=np.float32)
        out[needed] = found / np.maximum(norms, 1e-12)
        sides.append(out)
    return evaluate_embeddings(sides[0], sides[1], collection)
