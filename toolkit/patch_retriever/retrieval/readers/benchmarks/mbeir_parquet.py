"""M-BEIR as MRBench and mteb put it on the Hub: Parquet, a repository for each task.

A task's folder holds `query/`, `corpus/` and `qrels/` with SPLIT-00000-of-00001.parquet files (as
the Hub lays out a dataset's configurations), or query-*.parquet, corpus-*.parquet and
qrels-*.parquet. Columns of queries and corpus: id, modality, text, image ({bytes, path}); of
qrels: query-id, Q0, corpus-id, score.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from patch_retriever.errors import UserError
from patch_retriever.items import Item, Kind
from patch_retriever.retrieval.readers.benchmarks.mbeir_assembly import (
    Judgement,
    Row,
    Side,
    assemble,
    collect_side,
    kind_of,
)
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import TASKS, find_task
from patch_retriever.retrieval.readers.benchmarks.parquet_shards import ParquetShards
from patch_retriever.retrieval.readers.benchmarks.shared import said
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

_PARTS = {"query": ("query", "queries"), "corpus": ("corpus",), "qrels": ("qrels", "default")}
"""The parts of a task, and what their folders are called."""


def task_folders(root: Path) -> list[Path]:
    """The task folders in `root`, those of M-BEIR first; or `root`, if it is one."""
    if _is_task(root):
        return [root]
    order = {task.name: number for number, task in enumerate(TASKS)}
    folders = [path for path in root.glob("*/") if _is_task(path)]
    return sorted(folders, key=lambda path: (order.get(path.name, len(order)), path.name))


def read_root(root: Path, name: str | None, options: ReadOptions) -> list[RetrievalTask]:
    """All tasks of a folder, or the one with a name.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    folders = task_folders(root)
    if not folders:
        raise UserError(
            f"{root}: no M-BEIR here; a task's folder has query, corpus and qrels in Parquet, "
            "UniIR's root has query/ and cand_pool/"
        )
    if name is not None:
        task = find_task(name)
        wanted = {name, *([task.name, task.name.removeprefix("mbeir_")] if task else [])}
        there = ", ".join(path.name for path in folders)
        folders = [path for path in folders if path.name in wanted]
        if not folders:
            called = f"{name} ({task.name})" if task and task.name != name else name
            raise UserError(f"{root}: no folder of {called} in it; there are {there}")
    return [_read_task(folder, options) for folder in folders]


def _is_task(folder: Path) -> bool:
    return bool(_files(folder, "query") and _files(folder, "corpus"))


def _files(folder: Path, part: str) -> list[Path]:
    for name in _PARTS[part]:
        for pattern in (f"{name}/*.parquet", f"{name}-*.parquet", f"data/{name}-*.parquet"):
            if found := sorted(folder.glob(pattern)):
                return found
    return []


def _split(folder: Path, part: str, split: str) -> list[Path]:
    """The files of a split of a part; the only split there is may have any name.

    The corpus often is a split of its own, called "corpus".
    """
    files = _files(folder, part)
    if not files:
        raise UserError(f"{folder}: no Parquet files of its {part}")
    splits = sorted({path.name.split("-")[0] for path in files})
    if split not in splits:
        if len(splits) > 1 or (split != "test" and part != "corpus"):
            raise UserError(f"{folder}: its {part} has no split {split}, but {', '.join(splits)}")
        split = splits[0]
    return [path for path in files if path.name.split("-")[0] == split]


def _called(folder: Path) -> str:
    """The folder's name, or the repository's where it is a snapshot in the Hub's cache."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _read_task(folder: Path, options: ReadOptions) -> RetrievalTask:
    task = find_task(_called(folder))
    return assemble(
        where=folder,
        name=task.name if task else _called(folder),
        task=task,
        options=options,
        queries=_side(_split(folder, "query", options.split), options.skip_bad),
        pool=_side(_split(folder, "corpus", options.split), options.skip_bad),
        judgements=_judgements(_split(folder, "qrels", options.split)),
        prompts={},
    )


def _side(paths: list[Path], skip_bad: bool) -> Side:
    rows = ParquetShards(paths, ["id", "modality", "text", "image"])
    texts, pictures = ParquetShards(paths, ["text"]), rows.pictures("image")
    kinds = map(kind_of, rows.column("modality"))
    shown = np.fromiter((kind in ("image", "both") for kind in kinds), bool, len(rows))
    no_picture = pictures.missing(shown)

    def make(row: int, kind: Kind) -> Item:
        return Item(
            None if kind == "image" else said(texts[row]["text"]),
            None if kind == "text" else pictures[row],
        )

    found = (
        Row(name, modality, not blank, row not in no_picture)
        for row, (name, modality, blank) in enumerate(
            zip(rows.column("id"), rows.column("modality"), rows.blank("text"), strict=True)
        )
    )
    return collect_side(found, rows.where, make, skip_bad)


def _judgements(paths: list[Path]) -> Iterator[Judgement | str]:
    columns = ["query-id", "corpus-id", "score"]
    rows = ParquetShards(paths, columns)
    judged = zip(*(rows.column(name) for name in columns), strict=True)
    for row, (query, candidate, score) in enumerate(judged):
        if query is None or candidate is None or score is None:
            yield f"{rows.where(row)}: no query-id, corpus-id or score"
        else:
            yield Judgement(rows.where(row), str(query), str(candidate), int(score))
