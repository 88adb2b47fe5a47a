"""M-BEIR's tasks, put together from the rows and judgements of either release."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patch_retriever.errors import UserError
from patch_retriever.items import KINDS, Item, Kind
from patch_retriever.lazy import Lazy
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import DIRECTIONS, MbeirTask, task_of
from patch_retriever.retrieval.readers.benchmarks.shared import LETTERS, BadRows, side
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

_MODALITIES: dict[frozenset[str], Kind] = {
    frozenset({"text"}): "text",
    frozenset({"image"}): "image",
    frozenset({"image", "text"}): "both",
}


def kind_of(modality: object) -> Kind | None:
    """What a row holds, by its modality: "text", "image", and "image,text" in either order."""
    if not isinstance(modality, str):
        return None
    return _MODALITIES.get(frozenset(map(str.strip, modality.split(","))))


@dataclass(frozen=True)
class Side:
    """The queries or the candidates of a task: ids, items and each one's number in `KINDS`."""

    ids: list[str]
    items: Lazy[Item]
    kinds: np.ndarray
    skipped: tuple[str, ...]

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where each id stands."""
        return {name: position for position, name in enumerate(self.ids)}

    def kind(self, name: str) -> Kind:
        """What the item with this id holds."""
        return KINDS[self.kinds[self.positions[name]]]


class Row(NamedTuple):
    """What a side is checked by: one row of it."""

    name: object
    modality: object
    has_text: bool
    has_picture: bool


class Judgement(NamedTuple):
    """A line of the qrels, and where it stands."""

    where: str
    query: str
    candidate: str
    grade: int


def collect_side(
    rows: Iterable[Row | str | None],
    where: Callable[[int], str],
    make: Callable[[int, Kind], Item],
    skip_bad: bool,
) -> Side:
    """The usable rows of a side; `make` is given a row's number and what it holds.

    Args:
        rows: in order; a string says what is wrong with a row, None is a row to pass over.
        where: the file and line of a row.
        make: the item of a row, when it is asked for.
        skip_bad: leave out bad rows.

    Raises:
        UserError: a bad row.
    """
    bad = BadRows(skip_bad)
    ids: list[str] = []
    kept: list[int] = []
    seen: set[str] = set()
    kinds = array("b")
    for number, row in enumerate(rows):
        kind = kind_of(row.modality) if isinstance(row, Row) else None
        kinds.append(-1 if kind is None else KINDS.index(kind))
        problem = _problem(row, kind, seen) if isinstance(row, Row) else row
        if problem is not None:
            bad.add(f"{where(number)}: {problem}")
        elif isinstance(row, Row):
            seen.add(str(row.name))
            ids.append(str(row.name))
            kept.append(number)
    kinds_of_rows = np.array(kinds, dtype=np.int8)
    numbers = np.array(kept, dtype=np.int64)
    items = Lazy(numbers, lambda number: make(number, KINDS[kinds_of_rows[number]]))
    return Side(ids, items, kinds_of_rows[numbers], bad.lines)


def _problem(row: Row, kind: Kind | None, seen: set[str]) -> str | None:
    if row.name is None or row.name == "":
        return "no id"
    if str(row.name) in seen:
        return f"id {row.name} is there twice"
    if kind is None:
        return f"modality {row.modality!r} is none of 'text', 'image' and 'image,text'"
    if kind == "text" and not row.has_text:
        return f"{row.name} has no text"
    if kind != "text" and not row.has_picture:
        return f"{row.name} has no image"
    return None


def assemble(
    where: Path,
    name: str,
    task: MbeirTask | None,
    options: ReadOptions,
    queries: Side,
    pool: Side,
    judgements: Iterable[Judgement | str],
    prompts: Mapping[str, str],
) -> RetrievalTask:
    """Put a task together, and check that its ids and modalities are what they should be.

    A judgement that is a string says what is wrong with a line. Queries that nothing is judged for
    are bad rows. So is a judged candidate that is not in the pool, unless it belongs to another
    dataset than the query: OVEN and InfoSeek share positives, and a local pool has only its own.

    Raises:
        UserError: a bad row, or the data has another direction than its name says.
    """
    bad = BadRows(options.skip_bad)
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    for judged in judgements:
        if isinstance(judged, str):
            bad.add(judged)
        elif judged.query not in queries.positions:
            bad.add(f"{judged.where}: there is no query {judged.query}")
        elif judged.candidate not in pool.positions and _dataset(judged.query) == _dataset(
            judged.candidate
        ):
            bad.add(f"{judged.where}: there is no candidate {judged.candidate}")
        elif qrels[judged.query].setdefault(judged.candidate, judged.grade) != judged.grade:
            bad.add(f"{judged.where}: {judged.query} and {judged.candidate} are judged twice")
    for query in queries.ids:
        if not qrels.get(query):
            bad.add(f"{where}: nothing is judged for query {query}")
    kept = np.array([i for i, query in enumerate(queries.ids) if qrels.get(query)], dtype=np.int64)
    if not len(kept):
        raise UserError(f"{where}: {name} has no usable query; bad rows: {len(bad.lines)}")
    if task is not None:
        _check_direction(where, task, queries, pool, qrels)
    ids = [queries.ids[i] for i in kept]
    kinds = (KINDS[k] for k in np.unique(queries.kinds[kept]))
    pool_kinds = (KINDS[k] for k in np.unique(pool.kinds))
    return RetrievalTask(
        name=name if options.pool == "local" else f"{name}_union",
        split=options.split,
        direction=f"{side(kinds)}->{side(pool_kinds)}",
        query_ids=ids,
        queries=Lazy(kept, queries.items.__getitem__),
        candidate_ids=pool.ids,
        candidates=pool.items,
        qrels={query: qrels[query] for query in ids},
        prompts=prompts,
        skipped=(*queries.skipped, *pool.skipped, *bad.lines),
    )


def _dataset(name: str) -> str:
    return name.rpartition(":")[0]


def _check_direction(
    where: Path, task: MbeirTask, queries: Side, pool: Side, qrels: dict[str, dict[str, int]]
) -> None:
    """What most judged pairs hold has to be what the task's number stands for."""
    pairs = Counter(
        (queries.kind(query), pool.kind(candidate))
        for query, judged in qrels.items()
        for candidate, grade in judged.items()
        if grade > 0 and candidate in pool.positions
    )
    if not pairs:
        raise UserError(f"{where}: {task.name} has no positive candidate in its pool")
    (asked, answer), _ = pairs.most_common(1)[0]
    found = f"{LETTERS[asked]}->{LETTERS[answer]}"
    if found != task.direction:
        other = task_of(task.dataset, found)
        meant = f"; on the Hub such data is {other.name}" if other else ""
        numbers = ", ".join(f"{number} {direction}" for number, direction in DIRECTIONS.items())
        raise UserError(
            f"{where}: {task.name} should be {task.direction}, but its data is {found}{meant}. "
            f"Tasks go by the Hub's numbers ({numbers}), not by those of the paper's code"
        )
