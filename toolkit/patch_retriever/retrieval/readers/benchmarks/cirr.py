"""CIRR (Liu et al., ICCV 2021): a photograph and how another one differs from it.

captions/cap.rc2.SPLIT.json        [{"pairid": 12060, "reference": "dev-244-0-img0",
    "target_hard": "dev-1028-1-img1", "target_soft": {...}, "caption": "show three bottles ...",
    "img_set": {"id": 36, "members": [six names], ...}}, ...]
image_splits/split.rc2.SPLIT.json  {"dev-244-0-img0": "./dev/dev-244-0-img0.png", ...}
dev/, test1/, train/0 ... train/99    the pictures
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers.benchmarks.composed import (
    Composed,
    composed_task,
    existing,
    field,
    usable,
)
from patch_retriever.retrieval.readers.benchmarks.json_rows import read_json
from patch_retriever.retrieval.readers.benchmarks.shared import BadRows, image_folder
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask


def read_cirr(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """The whole split as candidates, and the subset task: the five others of the query's set.

    The reference is never a candidate; `target_hard` alone is relevant, as in the paper's Recall@K.

    Args:
        location: the folder that holds `captions` and `image_splits`, or its parent.
        options: `split` is val or train: test1 has no targets.

    Raises:
        UserError: no such folder or split, a bad entry, a missing picture.
    """
    if options.split.startswith("test"):
        raise UserError(
            f"{location}: CIRR's test1 has no targets (a server scores it); use --split val"
        )
    root = Path(location)
    folders = (root, root / "cirr", root / "cirr_dataset", root / "cirr_dataset" / "cirr")
    base = next((folder for folder in folders if (folder / "captions").is_dir()), root)
    listed = base / "image_splits" / f"split.rc2.{options.split}.json"
    paths = read_json(listed)
    if not isinstance(paths, dict) or not paths:
        raise UserError(f"{listed}: not a JSON object of names and paths")
    usual = (root, base, base.parent, root / "images", root / "img_raw")
    images = image_folder(options.images, usual, map(str, paths.values()))
    bad = BadRows(options.skip_bad)
    pictures = {str(name): images / str(path) for name, path in paths.items()}
    pictures = existing(pictures, listed, bad)
    captions = base / "captions" / f"cap.rc2.{options.split}.json"
    entries = read_json(captions)
    if not isinstance(entries, list):
        raise UserError(f"{captions}: not a JSON list")
    made = [_query(f"{captions}: entry {number}", entry) for number, entry in enumerate(entries)]
    queries = usable(made, pictures, captions, bad)
    name = f"cirr_{options.split}"
    whole = [replace(query, members=()) for query in queries]
    return [
        composed_task(name, options, whole, pictures, bad, exclude_reference=True),
        composed_task(f"{name}_subset", options, queries, pictures, bad, exclude_reference=True),
    ]


def _query(where: str, entry: Any) -> Composed | str:
    """A caption's entry, or what is wrong with it."""
    parts = [field(entry, name) for name in ("reference", "caption", "target_hard")]
    pair = entry.get("pairid") if isinstance(entry, dict) else None
    members = (entry.get("img_set") or {}).get("members") if isinstance(entry, dict) else None
    if pair is None or None in parts or not isinstance(members, list):
        return f"{where}: no pairid, reference, caption, target_hard or img_set with members"
    reference, caption, target = (part or "" for part in parts)
    if target not in members:
        return f"{where}: target_hard {target} is not in its img_set"
    return Composed(where, str(pair), reference, caption, target, tuple(map(str, members)))
