"""Tasks of the built-in world."""

from __future__ import annotations

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.scenes.tasks import scenes_collection

SPLITS = ("calibration", "validation", "test")


def read_scenes(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """Ten tasks in all eight directions over `options.n` scenes; there is only one location, "".

    Raises:
        UserError: there is no such split, or something is named after `scenes:`.
    """
    if location:
        raise UserError(f"scenes:{location}: the built-in world is called scenes alone")
    if options.split not in SPLITS:
        known = ", ".join(SPLITS)
        raise UserError(f"scenes: no split {options.split!r}; there are {known}")
    return list(scenes_collection(options.split, options.n, options.seed).retrieval_tasks())
