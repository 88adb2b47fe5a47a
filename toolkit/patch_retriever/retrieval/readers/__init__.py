"""Retrieval tasks and corpora from the files that people have."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

FORMATS = {
    "scenes": "scenes.read_scenes",
    "pairs": "pairs.read_pairs_tasks",
    "datasets": "pairs.read_datasets_tasks",
    "mbeir": "benchmarks.mbeir.read_mbeir",
    "mmeb": "benchmarks.mmeb.read_mmeb",
    "karpathy": "benchmarks.karpathy.read_karpathy",
    "cirr": "benchmarks.cirr.read_cirr",
    "fashioniq": "benchmarks.fashioniq.read_fashioniq",
    "mteb": "benchmarks.mteb_tasks.read_mteb",
}
"""The reader of each format: a function of a location and `ReadOptions` in a module here."""


def read_tasks(spec: str, options: ReadOptions | None = None) -> list[RetrievalTask]:
    """The tasks that a user names.

    Args:
        spec: `scenes` (the built-in world), a file, folder or pattern of pairs, or
            `FORMAT:LOCATION`.
        options: split, where pictures lie, at most how many queries, and so on.

    Raises:
        UserError: the format is unknown, or its reader finds something wrong.
    """
    from patch_retriever.retrieval.readers.sources import exists

    options = options or ReadOptions()
    name, colon, location = spec.partition(":")
    if name not in FORMATS or not (colon or name == "scenes"):
        if colon and not exists(spec):
            raise UserError(
                f"{spec}: no such file, and no format {name!r}; formats are {', '.join(FORMATS)}"
            )
        name, location = "pairs", spec
    module, _, function = FORMATS[name].rpartition(".")
    reader = getattr(import_module(f"{__name__}.{module}"), function)
    tasks: list[RetrievalTask] = reader(location, options)
    return [_limited(task, options.limit) for task in tasks]


def _limited(task: RetrievalTask, limit: int | None) -> RetrievalTask:
    """The task with its first queries only."""
    if limit is None or limit >= len(task.query_ids):
        return task
    ids = task.query_ids[:limit]
    return replace(
        task,
        query_ids=ids,
        queries=task.queries[:limit],
        qrels={query: task.qrels[query] for query in ids},
        excluded={query: task.excluded[query] for query in ids if query in task.excluded},
        pools={query: task.pools[query] for query in ids if query in task.pools},
    )
