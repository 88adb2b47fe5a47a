"""Runs of mteb: tasks by name or benchmark, results in mteb's own layout, stopped runs go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError, first_line
from patch_retriever.progress import Say, silent
from patch_retriever.retrieval.readers.benchmarks.mteb_tasks import (
    find_task,
    import_mteb,
    load_data,
    near,
)

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.cache import ResultCache
    from mteb.results import TaskResult

    from patch_retriever.retrieval.mteb.encoder import MtebEncoder


def named_tasks(names: Sequence[str], benchmarks: Sequence[str] = ()) -> list[AbsTask]:
    """mteb's tasks by their names, and those of its benchmarks, each once.

    Raises:
        UserError: there is no task or benchmark of one of the names.
    """
    mteb = import_mteb()
    found = [find_task(name) for name in names]
    for name in benchmarks:
        try:
            found += mteb.get_benchmark(name).tasks
        except KeyError:
            known = [benchmark.name for benchmark in mteb.get_benchmarks()]
            raise UserError(f"no benchmark {name!r} in mteb{near(name, known)}") from None
    return list({task.metadata.name: task for task in found}.values())


def run_mteb(
    model: MtebEncoder,
    tasks: Sequence[AbsTask],
    folder: Path,
    batch_size: int = 32,
    say: Say = silent,
) -> dict[str, Any]:
    """Score `model` on `tasks`; what `folder` holds for this model already is not run again.

    A task that fails does not stop the others. Results lie in
    `folder/results/ORGANIZATION__NAME/REVISION/TASK.json`, as mteb keeps them.

    Returns:
        The model's name and revision, and for every task its main score (mean over its subsets)
        and the score of every split and subset, or why it failed.

    Raises:
        UserError: the folder cannot be written.
    """
    mteb = import_mteb()
    meta = model.mteb_model_meta
    try:
        cache = mteb.ResultCache(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    rows = []
    for number, task in enumerate(tasks, 1):
        say(f"{task.metadata.name} ({number} of {len(tasks)})")
        row: dict[str, Any] = {"task": task.metadata.name, "metric": task.metadata.main_score}
        try:
            rows.append(row | _scores(_evaluate(model, task, cache, batch_size, say)))
        except UserError as error:
            if len(tasks) > 1:  # else it is said at the end
                say(f"failed: {error}")
            rows.append(row | {"failed": str(error)})
    return {"model": meta.name, "revision": meta.revision, "tasks": rows}


def _evaluate(
    model: MtebEncoder, task: AbsTask, cache: ResultCache, batch_size: int, say: Say
) -> TaskResult:
    mteb = import_mteb()
    path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
    whole = _is_whole(path)
    if not whole:
        say(f"{path}: damaged; its task is run again")
    for part in (task, *getattr(task, "tasks", ())):  # of an aggregate
        # what mteb calls when it needs the data: finished tasks load none
        part.load_data = partial(_load, part)
    try:
        with _no_bars():
            (result,) = mteb.evaluate(
                model,
                task,
                co2_tracker=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                cache=cache,
                overwrite_strategy="only-missing" if whole else "always",
                show_progress_bar=False,
            ).task_results
    except (ValueError, TypeError) as error:
        raise UserError(f"{task.metadata.name}: {first_line(error)}") from error
    return result


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of every table that mteb rewrites."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _is_whole(path: Path) -> bool:
    """Whether mteb can read a result that is there; it writes them in place."""
    from mteb.results import TaskResult

    try:
        return not path.is_file() or bool(TaskResult.from_disk(path))
    except (ValueError, KeyError, TypeError, AttributeError):  # as the bytes happen to be
        return False


def _load(task: AbsTask, *_: Any, **__: Any) -> None:
    load_data(task)


def _scores(result: TaskResult) -> dict[str, Any]:
    scores = {
        split: {entry["hf_subset"]: entry["main_score"] for entry in entries}
        for split, entries in result.scores.items()
    }
    return {"score": float(result.get_score()), "scores": scores}
