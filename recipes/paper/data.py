"""The data folders: M-BEIR's tasks and COCO's captions, whole or cut down for a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patch_retriever.errors import UserError
from patch_retriever.items import Item, Kind
from patch_retriever.lazy import Lazy
from patch_retriever.pictures.picture import Picture
from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.benchmarks import mbeir_jsonl, mbeir_parquet
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import TASKS, find_task
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.readers.sources import open_source
from patch_retriever.retrieval.readers.sources.rows import Reading
from patch_retriever.retrieval.tasks import RetrievalTask

MORE = 10
"""Candidates of a trial for each of its queries, beyond the positives."""


def task_names(mbeir: Path, wanted: Sequence[str] = ()) -> list[str]:
    """Which of M-BEIR's sixteen tasks lie in a folder, in the paper's order; or those of `wanted`.

    Args:
        mbeir: MRBench's task folders side by side (Parquet), or UniIR's release.
        wanted: names as `find_task` knows them: mscoco_task3, mscoco@paper4, cirr.

    Raises:
        UserError: none is there, one that is wanted is not, or a folder has no name of a task.
    """
    if mbeir_jsonl.is_root(mbeir):
        tests = mbeir / "query" / "test"
        there = {task.name for task in TASKS if (tests / f"{task.name}_test.jsonl").is_file()}
    else:
        found = [find_task(path.name) for path in mbeir_parquet.task_folders(mbeir)]
        there = {task.name for task in found if task is not None}
    ordered = [task.name for task in sorted(TASKS, key=lambda t: t.number) if task.name in there]
    if not ordered:
        raise UserError(f"{mbeir}: no task of M-BEIR in it (folders such as mbeir_mscoco_task3)")
    for name in wanted:
        task = find_task(name)
        if task is None or task.name not in there:
            raise UserError(f"{mbeir}: no task {name} in it; there are {', '.join(ordered)}")
    chosen = {task.name for name in wanted if (task := find_task(name))}
    return [name for name in ordered if not chosen or name in chosen]


def read_task(
    mbeir: Path, name: str, limit: int | None = None, skip_bad: bool = False
) -> RetrievalTask:
    """One task with its own (local) pool; with `limit`, a trial of so many queries.

    Raises:
        UserError: a bad row.
    """
    (task,) = read_tasks(f"mbeir:{mbeir}#{name}", ReadOptions(limit=limit, skip_bad=skip_bad))
    return task if limit is None else trial(task, MORE * limit)


def has_support(mbeir: Path, name: str) -> bool:
    """Whether a task's validation queries are there (in UniIR's release only)."""
    return mbeir_jsonl.is_root(mbeir) and (mbeir / f"query/val/{name}_val.jsonl").is_file()


def read_support(mbeir: Path, name: str, skip_bad: bool = False) -> Sequence[Item]:
    """A task's validation queries: what a search system may know of its queries beforehand.

    Raises:
        UserError: a bad row.
    """
    options = ReadOptions(split="val", skip_bad=skip_bad)
    (task,) = read_tasks(f"mbeir:{mbeir}#{name}", options)
    return task.queries


def trial(task: RetrievalTask, more: int) -> RetrievalTask:
    """The task with the positives of its queries and `more` other candidates, evenly spaced."""
    judged = {name for query in task.query_ids for name in task.qrels[query]}
    everything = np.arange(len(task.candidate_ids))
    kept = np.array([name in judged for name in task.candidate_ids], dtype=bool)
    others = everything[~kept]
    picks = np.linspace(0, len(others) - 1, min(more, len(others))).round().astype(int)
    kept[others[picks]] = True
    numbers = everything[kept]
    return replace(
        task,
        candidate_ids=[task.candidate_ids[i] for i in numbers],
        candidates=Lazy(numbers, task.candidates.__getitem__),
    )


def captions_of(task: RetrievalTask) -> set[str]:
    """All texts of a task, for keeping them out of what is learned."""
    items = (item for side in (task.queries, task.candidates) for item in side)
    return {_plain(item.text) for item in items if item.text}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Captioned:
    """A picture of COCO's and what is said of it."""

    picture: Picture
    captions: tuple[str, ...]

    def item(self, kind: Kind) -> Item:
        """The picture, its first caption, or both."""
        return Item(
            None if kind == "image" else self.captions[0],
            None if kind == "text" else self.picture,
        )


def read_coco(folder: Path, held_out: set[str]) -> list[Captioned]:
    """The rows of lmms-lab/COCO-Caption's val-*.parquet, columns `image` and `answer` (a list).

    Rows with a caption in `held_out` are left out: the release holds M-BEIR's test pictures.

    Raises:
        UserError: no such files, or nothing usable in them.
    """
    paths = sorted(folder.rglob("val-*.parquet"))
    if not paths:
        raise UserError(f"{folder}: no val-*.parquet (lmms-lab/COCO-Caption) in it")
    rows = open_source(str(folder / "**" / "val-*.parquet"), Reading.choose(text_column="answer"))
    found = []
    for row in rows.rows():
        said = [row.text] if isinstance(row.text, str) else row.text or []
        captions = tuple(text.strip() for text in said if isinstance(text, str) and text.strip())
        if not row.pictures or not captions:
            raise UserError(f"{row.where}: a picture and captions expected (image, answer)")
        if not held_out.intersection(map(_plain, captions)):
            found.append(Captioned(row.pictures[0], captions))
    if len(found) < 2:
        raise UserError(f"{folder}: no captioned picture in it that is not one of the test's")
    return found


def sample(rows: Sequence[Captioned], n: int) -> list[Captioned]:
    """At most `n` rows, drawn at random but always the same."""
    picks = np.random.default_rng(0).permutation(len(rows))[:n]
    return [rows[i] for i in np.sort(picks)]
