"""The tasks that a user names, each under a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask


def read_chosen(
    specs: Sequence[str], options: ReadOptions, only: Sequence[str] = ()
) -> dict[str, RetrievalTask]:
    """All tasks of `specs`, or those with a name or a direction in `only`, by name.

    Where two have the same name, it is followed by where they are from.

    Raises:
        UserError: one cannot be read, or none has a wanted name or direction.
    """
    found = [(spec, task) for spec in dict.fromkeys(specs) for task in read_tasks(spec, options)]
    there = {name for _, task in found for name in (task.name, task.direction)}
    for name in only:
        if name not in there:
            raise UserError(f"no task {name!r} here; there are {', '.join(sorted(there))}")
    found = [(s, t) for s, t in found if not only or {t.name, t.direction} & set(only)]
    for called in (_short, str):  # the shortest that tells them apart
        names = [task.name for _, task in found]
        twice = {name for name, times in Counter(names).items() if times > 1}
        labels = [f"{t.name} ({called(s)})" if t.name in twice else t.name for s, t in found]
        if len(set(labels)) == len(labels):
            break
    else:
        raise UserError(f"two tasks are called {Counter(labels).most_common(1)[0][0]!r}; name one")
    return dict(zip(labels, (task for _, task in found), strict=True))


def _short(spec: str) -> str:
    return "/".join(Path(spec).parts[-2:])


def calibration_tasks(
    specs: Sequence[str], built: Mapping[str, Any], options: ReadOptions
) -> list[RetrievalTask]:
    """What baselines may learn from: tasks that are named, read with `options`, or else those that
    a build with the settings `built` was fitted on; none where there is neither."""
    if not specs and built:
        specs = [built["pairs"]]
        names = ("skip_bad", "seed", "image_column", "text_column")
        said = {name: built[name] for name in names if name in built}
        options = ReadOptions(split="calibration", n=built["scenes"]["calibration"], **said)
    return [task for spec in specs for task in read_tasks(spec, options)]
