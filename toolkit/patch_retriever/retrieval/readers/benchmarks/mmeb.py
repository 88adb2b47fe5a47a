"""MMEB (VLM2Vec, Jiang et al., ICLR 2025): Parquet, a folder for each of its datasets.

    MSCOCO_t2i/test-00000-of-00001.parquet    qry_text, qry_img_path, tgt_text, tgt_img_path
    MSCOCO_t2i/original-00000-of-00001.parquet    (the training release) qry, qry_image_path,
                                              pos_text, pos_image_path, neg_text, neg_image_path
    images/                                   what paths start from; "" is no picture

In the release for evaluation tgt_text and tgt_img_path are lists, the query's own candidates, of
which the first is the answer; a tgt_text that is one text belongs to every picture. Releases
without instructions in the texts have them in qry_inst and tgt_inst.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from patch_retriever.errors import UserError
from patch_retriever.hub import fetch_parquet, is_hub_id
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.readers.benchmarks.parquet_shards import ParquetShards, column_names
from patch_retriever.retrieval.readers.benchmarks.shared import BadRows, image_folder, said, side
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

IMAGE_TOKEN = "<|image_1|>"
"""Where Phi-3.5-V's image goes in a text; other backbones place images themselves."""

_EVAL = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
_INSTRUCTIONS = ("qry_inst", "tgt_inst")


class _Part(NamedTuple):
    """A text and a picture's path, of which one may be missing."""

    text: str | None
    path: str | None


class _Query(NamedTuple):
    where: str
    query: _Part
    candidates: list[_Part]
    """The answer first."""


def read_mmeb(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """One dataset of MMEB, or all that are there.

    In the release for evaluation each query ranks its own candidates (`pools`). In the training
    release all positives and hard negatives are the candidates.

    Args:
        location: the folder of a dataset; ROOT for all in it, or ROOT#MSCOCO_t2i; or a hub id in
            the place of ROOT, with pictures in `options.images`.
        options: `split` is test, or original or diverse_instruction of the training release.

    Raises:
        UserError: no such folder, dataset or split, a bad row, a missing picture.
    """
    root, _, name = location.partition("#")
    folder = Path(root)
    if not folder.is_dir() and is_hub_id(root):
        folder = fetch_parquet(root, name or None)
    held = sorted(path for path in folder.glob("*/") if list(path.glob("*.parquet")))
    if name and held and folder / name not in held:
        there = ", ".join(path.name for path in held)
        raise UserError(f"{folder}: no dataset {name} of MMEB here; there are {there}")
    if name:
        folders = [folder / name]
    elif list(folder.glob("*.parquet")):
        folders = [folder]
    else:
        folders = held
    if not folders:
        raise UserError(f"{location}: no Parquet files of MMEB here")
    return [_read_dataset(path, options) for path in folders]


def _read_dataset(folder: Path, options: ReadOptions) -> RetrievalTask:
    paths = sorted(folder.glob(f"{options.split}-*.parquet"))
    if not paths:
        splits = sorted({path.name.split("-")[0] for path in folder.glob("*.parquet")})
        there = ", ".join(splits) or "no Parquet files"
        raise UserError(f"{folder}: no split {options.split}; there are {there}")
    bad = BadRows(options.skip_bad)
    columns = column_names(paths[0])
    trained_on = "qry" in columns
    queries: list[_Query] = []
    for row in _training_rows(paths) if trained_on else _evaluation_rows(paths, columns):
        if isinstance(row, str):
            bad.add(row)
        else:
            queries.append(row)
    return _task(folder, options, queries, trained_on, bad)


def _evaluation_rows(paths: list[Path], columns: list[str]) -> Iterator[_Query | str]:
    rows = ParquetShards(paths, [*_EVAL, *(name for name in _INSTRUCTIONS if name in columns)])
    part = cache(_part)  # most candidates are those of many queries
    for number, row in enumerate(rows):
        where = rows.where(number)
        texts, pictures = row["tgt_text"], row["tgt_img_path"]
        if isinstance(texts, str) and isinstance(pictures, list):
            texts = [texts] * len(pictures)
        if not isinstance(texts, list) or not isinstance(pictures, list) or not texts:
            yield f"{where}: tgt_text and tgt_img_path are not lists of candidates"
        elif len(texts) != len(pictures):
            yield f"{where}: {len(texts)} tgt_text, but {len(pictures)} tgt_img_path"
        else:
            query = part(row["qry_text"], row["qry_img_path"], row.get("qry_inst"))
            pairs = zip(texts, pictures, strict=True)
            candidates = [part(text, path, row.get("tgt_inst")) for text, path in pairs]
            yield _checked(where, query, candidates)


def _training_rows(paths: list[Path]) -> Iterator[_Query | str]:
    rows = ParquetShards(paths, _TRAIN)
    for number, row in enumerate(rows):
        query, positive, negative = (
            _part(row[text], row[path], None)
            for text, path in zip(_TRAIN[::2], _TRAIN[1::2], strict=True)
        )
        candidates = [positive] if negative == _Part(None, None) else [positive, negative]
        yield _checked(rows.where(number), query, candidates)


def _part(text: Any, path: Any, instruction: Any) -> _Part:
    words = " ".join(part for part in (said(instruction), said(text)) if part)
    return _Part(said(words.replace(IMAGE_TOKEN, "").strip()), said(path))


def _checked(where: str, query: _Part, candidates: list[_Part]) -> _Query | str:
    if query == _Part(None, None):
        return f"{where}: the query has no text and no picture"
    if _Part(None, None) in candidates:
        number = candidates.index(_Part(None, None))
        return f"{where}: candidate {number} has no text and no picture"
    return _Query(where, query, candidates)


def _task(
    folder: Path, options: ReadOptions, queries: list[_Query], trained_on: bool, bad: BadRows
) -> RetrievalTask:
    named = (part.path for row in queries for part in (row.query, *row.candidates) if part.path)
    first = next(named, None)
    usual = [
        base / name for base in (folder.parent, folder) for name in ("images", "", "eval_images")
    ]
    images = Path() if first is None else image_folder(options.images, usual, chain([first], named))
    gone: set[str] = set()
    exists = cache(lambda path: (images / path).is_file())

    def there(where: str, part: _Part) -> bool:
        if part.path is None or exists(part.path):
            return True
        if part.path not in gone:  # named once, however many queries have it among theirs
            gone.add(part.path)
            bad.add(f"{where}: {images / part.path}: no such image file")
        return False

    candidates: dict[_Part, str] = {}
    usable: list[_Query] = []
    pools: list[list[str]] = []
    for row in queries:
        own = [part for part in row.candidates if there(row.where, part)]
        pool = [candidates.setdefault(part, str(len(candidates))) for part in dict.fromkeys(own)]
        if there(row.where, row.query) and own and own[0] == row.candidates[0]:
            usable.append(row)
            pools.append(pool)
        else:
            bad.add(f"{row.where}: the picture of the query or of its answer is missing")
    if not usable:
        raise UserError(f"{folder}: no usable query; bad rows: {len(bad.lines)}")
    parts = list(candidates)
    ids = [str(number) for number in range(len(usable))]

    def item(part: _Part) -> Item:
        return Item(part.text, PictureFile(images / part.path) if part.path else None)

    return RetrievalTask(
        name=f"mmeb_{folder.name}",
        split=options.split,
        direction="->".join(
            side(item(part).kind for part in of) for of in ([q.query for q in usable], parts)
        ),
        query_ids=ids,
        queries=[item(row.query) for row in usable],
        candidate_ids=list(candidates.values()),
        candidates=Lazy(range(len(parts)), lambda number: item(parts[number])),
        qrels={name: {pool[0]: 1} for name, pool in zip(ids, pools, strict=True)},
        pools={} if trained_on else dict(zip(ids, pools, strict=True)),
        skipped=bad.lines,
    )
