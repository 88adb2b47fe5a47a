"""FashionIQ (Wu et al., CVPR 2021): a garment and two sentences on how another differs from it.

    captions/cap.CATEGORY.SPLIT.json          [{"candidate": "B005X4PL1G", "target": "B008BHCT58",
                                                "captions": ["is lighter", "has no sleeves"]}, ...]
    image_splits/split.CATEGORY.SPLIT.json    ["B005X4PL1G", ...]
    images/B005X4PL1G.png                     or .jpg; some are gone from where they were collected

Categories: dress, shirt, toptee.
"""

from __future__ import annotations

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
from patch_retriever.retrieval.readers.benchmarks.shared import BadRows
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

CATEGORIES = ("dress", "shirt", "toptee")
_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_fashioniq(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """A task for each category; the candidates are all pictures of its split list.

    The two sentences are joined by "and", as CLIP4Cir and most after it do; the reference stays
    among the candidates.

    Args:
        location: the folder that holds `captions` and `image_splits`; with `#dress`, one category.
        options: `split` is val or train: the test captions have no targets. Pictures are in
            `images` or in `options.images`.

    Raises:
        UserError: no such folder, category or split, a bad entry, a missing picture.
    """
    if options.split == "test":
        raise UserError(f"{location}: FashionIQ's test has no targets; use --split val")
    root_name, _, category = location.partition("#")
    root = Path(root_name)
    if category and category not in CATEGORIES:
        raise UserError(f"{location}: no category {category}, but {', '.join(CATEGORIES)}")
    there = [
        name
        for name in ((category,) if category else CATEGORIES)
        if category or _captions(root, name, options.split).is_file()
    ]
    if not there:
        raise UserError(f"{_captions(root, '*', options.split)}: no such files")
    images = options.images or root / "images"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of pictures; say where with --images")
    files = {path.name for path in images.iterdir()}
    return [_read_category(root, name, options, images, files) for name in there]


def _captions(root: Path, category: str, split: str) -> Path:
    return root / "captions" / f"cap.{category}.{split}.json"


def _read_category(
    root: Path, category: str, options: ReadOptions, images: Path, files: set[str]
) -> RetrievalTask:
    listed = root / "image_splits" / f"split.{category}.{options.split}.json"
    names, captions = read_json(listed), _captions(root, category, options.split)
    entries = read_json(captions)
    if not isinstance(names, list) or not isinstance(entries, list):
        wrong = captions if isinstance(names, list) else listed
        raise UserError(f"{wrong}: not a JSON list")
    bad = BadRows(options.skip_bad)
    pictures = {str(name): images / _file(str(name), files) for name in names}
    pictures = existing(pictures, listed, bad)
    made = [
        _query(f"{captions}: entry {number}", f"{category}-{number}", entry)
        for number, entry in enumerate(entries)
    ]
    queries = usable(made, pictures, captions, bad)
    name = f"fashioniq_{category}_{options.split}"
    return composed_task(name, options, queries, pictures, bad, exclude_reference=False)


def _file(name: str, files: set[str]) -> str:
    return next((name + suffix for suffix in _SUFFIXES if name + suffix in files), f"{name}.png")


def _query(where: str, name: str, entry: Any) -> Composed | str:
    """A caption's entry, or what is wrong with it."""
    reference, target = field(entry, "candidate"), field(entry, "target")
    captions = entry.get("captions") if isinstance(entry, dict) else None
    if not reference or not target:
        return f"{where}: no candidate or target"
    if not isinstance(captions, list) or not all(isinstance(said, str) for said in captions):
        return f"{where}: captions are not a list of texts"
    said = [caption for caption in (text.strip(".?, \n") for text in captions) if caption]
    if not said:
        return f"{where}: no captions"
    return Composed(where, name, reference, " and ".join(said), target)
