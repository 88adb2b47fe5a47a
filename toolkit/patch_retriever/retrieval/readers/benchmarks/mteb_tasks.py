"""mteb's and MIEB's retrieval tasks, and tasks in a user's own file, as `RetrievalTask`s."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from patch_retriever.errors import UserError, first_line
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureBytes, PictureFile
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks import AbsTask
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    from patch_retriever.retrieval.encoder import Role

_OWN = ".py:"
"""Between the file and the class of a task of the user's own."""


def import_mteb() -> Any:
    """mteb.

    Raises:
        UserError: it is not installed.
    """
    try:
        import mteb
    except ImportError:
        raise UserError("mteb is not installed; pip install 'patch-retriever[mteb]'") from None
    return mteb


def read_mteb(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """A task for every subset (most have one, multilingual ones many) of one of mteb's tasks.

    Args:
        location: `NAME`, or `NAME:SUBSET` for one subset alone; NAME is one of mteb's tasks, or
            `FILE.py:CLASS` for a subclass of `mteb.AbsTask` in a file.
        options: `split` is taken where the task has it, else the one split it is scored on;
            `limit` cuts the queries.

    Raises:
        UserError: there is no such task, it is no retrieval task, or its data are not there.
    """
    import_mteb()
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    own, found, rest = location.partition(_OWN)
    name, _, subset = rest.partition(":") if found else location.partition(":")
    task = find_task(f"{own}{_OWN}{name}" if found else name)
    if not isinstance(task, AbsTaskRetrieval):
        raise UserError(
            f"{name}: of mteb's type {task.metadata.type}, not retrieval; "
            f"`patch-retriever mteb --tasks {name}` runs it"
        )
    if subset:
        if subset not in task.hf_subsets:
            known = ", ".join(task.hf_subsets)
            raise UserError(f"{name}: no subset {subset!r}; there are {known}")
        task.hf_subsets = [subset]
    return retrieval_tasks(task, options)


def find_task(name: str) -> AbsTask:
    """One of mteb's tasks by its name, or a user's own by `FILE.py:CLASS`.

    Raises:
        UserError: there is none.
    """
    mteb = import_mteb()
    if _OWN in name:
        return _own_task(name)
    try:
        return mteb.get_task(name)
    except KeyError:
        import mteb.tasks

        classes: list[Any] = [c for c in vars(mteb.tasks).values() if isinstance(c, type)]
        names = [c.metadata.name for c in classes if issubclass(c, mteb.AbsTask)]
        raise UserError(f"no task {name!r} in mteb{near(name, names)}") from None


def near(name: str, names: Sequence[str]) -> str:
    """`; near: A, B`: the names most like an unknown one, or nothing."""
    lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    return f"; near: {', '.join(lower[n] for n in found)}" if found else ""


def _own_task(name: str) -> AbsTask:
    mteb = import_mteb()
    stem, _, class_name = name.partition(_OWN)
    path = Path(f"{stem}.py")
    if not path.is_file():
        raise UserError(f"{path}: no such file; a task of your own is FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{path}: does not run ({type(error).__name__}: {error})") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, mteb.AbsTask)):
        raise UserError(f"{path}: no class {class_name!r} that is an mteb.AbsTask")
    return found()


def load_data(task: AbsTask) -> None:
    """Load a task's tables, if they are not loaded: from the cache of `datasets` or the hub.

    Raises:
        UserError: they cannot be had.
    """
    if task.data_loaded:
        return
    try:
        type(task).load_data(task)
    except UserError:
        raise
    except Exception as error:  # the hub, the network and the loading script of 1,000 data sets
        data = task.metadata.dataset.get("path", "")
        raise UserError(
            f"{task.metadata.name}: its data set {data} cannot be loaded "
            f"({type(error).__name__}: {first_line(error)}); it is fetched from huggingface.co once"
        ) from error


def retrieval_tasks(task: AbsTaskRetrieval, options: ReadOptions) -> list[RetrievalTask]:
    """Every subset of an mteb task object; pictures stay undecoded until they are opened.

    Raises:
        UserError: its data are not there, or it has no such split.
    """
    name = task.metadata.name
    if task.skip_first_result:
        raise UserError(
            f"{name}: mteb drops the first result of every query here, whatever it is; "
            f"`patch-retriever mteb --tasks {name}` runs it"
        )
    splits = list(task.eval_splits)
    if options.split not in splits and len(splits) > 1:
        raise UserError(f"{name}: no split {options.split!r}; there are {', '.join(splits)}")
    split = options.split if options.split in splits else splits[0]
    task.filter_eval_splits([split])
    load_data(task)
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    subsets = [s for s in task.hf_subsets if s in task.dataset]
    return [_read(task, subset, split, options.limit) for subset in subsets]


def _read(task: AbsTaskRetrieval, subset: str, split: str, limit: int | None) -> RetrievalTask:
    data: Any = task.dataset[subset][split]
    judged = {q: docs for q, docs in data["relevant_docs"].items() if docs}  # as mteb does
    table = data["queries"]
    rows = [i for i, query in enumerate(table["id"]) if query in judged][:limit]
    queries = task_items(table.select(rows), task.metadata, "query")
    candidates = task_items(data["corpus"], task.metadata, "document")
    there = set(candidates.ids) if task.ignore_identical_ids else set()
    pools = data.get("top_ranked") or {}
    name = task.metadata.name if len(task.hf_subsets) == 1 else f"{task.metadata.name} {subset}"
    return RetrievalTask(
        name=name,
        split=split,
        direction="->".join((task.metadata.category or "t2t").split("2")),
        query_ids=queries.ids,
        queries=queries,
        candidate_ids=candidates.ids,
        candidates=candidates,
        qrels={query: dict(judged[query]) for query in queries.ids},
        excluded={query: frozenset({query}) for query in queries.ids if query in there},
        pools={query: tuple(pools.get(query, ())) for query in queries.ids} if pools else {},
        prompts={
            role: prompt
            for role in ("query", "document")
            if (prompt := task_prompt(task.metadata, role))
        },
    )


def task_prompt(metadata: TaskMetadata, role: str | None) -> str | None:
    """The instruction that a task gives for a role; one that is for no role in particular is for
    queries, and for tasks without roles (None)."""
    prompt: Any = metadata.prompt
    if isinstance(prompt, str):
        return prompt if role != "document" else None
    return (prompt or {}).get(role or "query") or None


@dataclass(frozen=True)
class TableItems(Sequence[Item]):
    """Items in a table of `datasets`, made when they are asked for."""

    name: str
    table: Dataset
    role: Role
    texts: bool
    pictures: bool

    @property
    def ids(self) -> tuple[str, ...]:
        """Of every row."""
        return tuple(map(str, self.table["id"]))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, i: int) -> Item: ...
    @overload
    def __getitem__(self, i: slice) -> TableItems: ...
    def __getitem__(self, i: int | slice) -> Item | TableItems:
        if isinstance(i, slice):
            return replace(self, table=self.table.select(range(*i.indices(len(self)))))
        row = self.table[i]
        text = _text(row, self.role) if self.texts else None
        picture = _picture(row, f"{self.name} {row['id']}") if self.pictures else None
        if text is None and picture is None:
            raise UserError(f"{self.name}: {row['id']} has neither a text nor a picture")
        return Item(text or (None if picture else text), picture)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))


def task_items(table: Dataset, metadata: TaskMetadata, role: Role) -> TableItems:
    """What a model sees of a task's queries or corpus: the parts that the task's category names,
    though the table may hold more."""
    from datasets import Image
    from mteb.types import PromptType

    modalities = metadata.get_modalities(PromptType(role))
    pictures = "image" in modalities and "image" in table.column_names
    seen = ["id", *(("image",) if pictures else ())]
    if "text" in modalities:
        seen += [c for c in ("text", "title", "instruction") if c in table.column_names]
    table = table.select_columns(seen)
    if pictures and isinstance(table.features["image"], Image):
        table = table.cast_column("image", Image(decode=False))
    return TableItems(metadata.name, table, role, "text" in modalities, pictures)


def _picture(row: dict[str, Any], name: str) -> PictureBytes | PictureFile | None:
    stored = row["image"]
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise UserError(f"{name}: its image is a {type(stored).__name__}, not an encoded picture")
    if stored.get("bytes") is None:
        return PictureFile(Path(stored["path"]))
    return PictureBytes(name, stored["bytes"])


def _text(row: dict[str, Any], role: Role) -> str | None:
    """A row's text as mteb puts it together (`mteb._create_dataloaders`): title and text of a
    document, text and instruction of a query, the turns of a conversation."""
    text = row.get("text")
    if role == "document":
        return None if text is None else f"{row.get('title') or ''} {text}".strip()
    instruction = row.get("instruction")
    if isinstance(text, list):
        turns = [t if isinstance(t, str) else f"{t['role']}: {t['content']}" for t in text]
        return " ".join(filter(None, (instruction, "; ".join(turns))))
    return text if instruction is None or text is None else f"{text} {instruction}"
