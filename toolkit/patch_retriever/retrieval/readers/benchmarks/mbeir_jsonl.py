"""M-BEIR as UniIR put it on the Hub (TIGER-Lab/M-BEIR): JSON lines and pictures beside them.

    query/SPLIT/mbeir_cirr_task7_SPLIT.jsonl    qid, query_txt, query_img_path, query_modality ...
    query/train/mbeir_cirr_train.jsonl          all tasks of a dataset, by task_id; pos_cand_list
    cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl        did, txt, img_path, modality ...
    cand_pool/global/mbeir_union_SPLIT_cand_pool.jsonl      the pools of all tasks in one
    qrels/SPLIT/mbeir_cirr_task7_SPLIT_qrels.txt            "qid 0 did grade task"
    instructions/query_instructions.tsv         query_modality, cand_modality, name, id, prompts
    mbeir_images/...                            what query_img_path and img_path name

MSCOCO alone has a local pool for each split (mbeir_mscoco_task0_test_cand_pool.jsonl).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.items import Item, Kind
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.readers.benchmarks.json_rows import JsonLines
from patch_retriever.retrieval.readers.benchmarks.mbeir_assembly import (
    Judgement,
    Row,
    Side,
    assemble,
    collect_side,
    kind_of,
)
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import TASKS, MbeirTask, find_task
from patch_retriever.retrieval.readers.benchmarks.shared import LETTERS, said
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask


@dataclass(frozen=True)
class _Keys:
    """What a file calls an item's parts."""

    name: str
    text: str
    picture: str
    modality: str


_QUERY = _Keys("qid", "query_txt", "query_img_path", "query_modality")
_CANDIDATE = _Keys("did", "txt", "img_path", "modality")


def is_root(root: Path) -> bool:
    """Whether UniIR's release is here."""
    return (root / "cand_pool").is_dir() and (root / "query").is_dir()


def read_root(root: Path, name: str | None, options: ReadOptions) -> list[RetrievalTask]:
    """All tasks whose queries are there, or the one with a name.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    if options.split == "train" and options.pool == "local":
        raise UserError(f"{root}: the train split has only the union pool; pass pool=union")
    tasks = [task for task in TASKS if _queries(root, task, options.split).is_file()]
    if name is not None:
        wanted = find_task(name)
        if wanted is None:
            raise UserError(f"{root}: M-BEIR has no task {name}, but {_listed(tasks or TASKS)}")
        if wanted not in tasks:
            raise UserError(f"{_queries(root, wanted, options.split)}: no such file")
        tasks = [wanted]
    if not tasks:
        raise UserError(f"{root}: no queries of the split {options.split} in query/{options.split}")
    images = options.images or root
    prompts = _prompts(root / "instructions" / "query_instructions.tsv")

    @cache
    def pool(path: Path) -> Side:  # the union is read once for all tasks
        return _side(JsonLines(path), _CANDIDATE, images, options.skip_bad, None)

    return [
        _read_task(root, task, options, images, pool(_pool(root, task, options)), prompts)
        for task in tasks
    ]


def _listed(tasks: tuple[MbeirTask, ...] | list[MbeirTask]) -> str:
    return ", ".join(f"{task.name} ({task.direction})" for task in tasks)


def _queries(root: Path, task: MbeirTask, split: str) -> Path:
    name = f"mbeir_{task.dataset}" if split == "train" else task.name
    return root / "query" / split / f"{name}_{split}.jsonl"


def _pool(root: Path, task: MbeirTask, options: ReadOptions) -> Path:
    pools = root / "cand_pool"
    if options.pool == "union":
        return pools / "global" / f"mbeir_union_{options.split}_cand_pool.jsonl"
    of_split = pools / "local" / f"{task.name}_{options.split}_cand_pool.jsonl"
    return of_split if of_split.is_file() else pools / "local" / f"{task.name}_cand_pool.jsonl"


def _read_task(
    root: Path,
    task: MbeirTask,
    options: ReadOptions,
    images: Path,
    pool: Side,
    prompts: dict[tuple[str, str], str],
) -> RetrievalTask:
    lines = JsonLines(_queries(root, task, options.split))
    if options.split == "train":
        queries = _side(lines, _QUERY, images, options.skip_bad, task.number)
        judgements = _positives(lines, task.number)
    else:
        queries = _side(lines, _QUERY, images, options.skip_bad, None)
        name = f"{task.name}_{options.split}_qrels.txt"
        judgements = _qrels(root / "qrels" / options.split / name)
    key = (str(task.dataset_id), task.direction)
    return assemble(
        where=lines.path,
        name=task.name,
        task=task,
        options=options,
        queries=queries,
        pool=pool,
        judgements=judgements,
        prompts={"query": prompts[key]} if key in prompts else {},
    )


def _side(lines: JsonLines, keys: _Keys, images: Path, skip_bad: bool, number: int | None) -> Side:
    """A side; of a file that holds all tasks of a dataset, the rows of the task with `number`."""

    def rows() -> Iterator[Row | str | None]:
        for row in lines.scan():
            if not isinstance(row, dict):
                yield row
            elif number is not None and row.get("task_id") != number:
                yield None
            else:
                text, picture = said(row.get(keys.text)), said(row.get(keys.picture))
                yield Row(
                    row.get(keys.name),
                    row.get(keys.modality),
                    text is not None,
                    picture is not None,
                )

    def make(row: int, kind: Kind) -> Item:
        values = lines[row]
        return Item(
            None if kind == "image" else said(values.get(keys.text)),
            None if kind == "text" else PictureFile(images / values[keys.picture]),
        )

    return collect_side(rows(), lines.where, make, skip_bad)


def _qrels(path: Path) -> Iterator[Judgement | str]:
    """Lines of "qid 0 did grade task"; the task is UniIR's number of the direction."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            query, _, candidate, grade = fields[:4]
            yield Judgement(f"{path}:{number}", query, candidate, int(grade))
        except ValueError:
            yield f"{path}:{number}: not 'query 0 candidate grade task'"


def _positives(lines: JsonLines, number: int) -> Iterator[Judgement | str]:
    """The positives in the training queries themselves."""
    for row, values in enumerate(lines.scan()):
        if isinstance(values, dict) and values.get("task_id") == number:
            for positive in values.get("pos_cand_list") or ():
                did = positive.get("did") if isinstance(positive, dict) else positive
                yield Judgement(lines.where(row), str(values.get("qid")), str(did), 1)


def _prompts(path: Path) -> dict[tuple[str, str], str]:
    """The first instruction of every dataset's id and direction; none where there is no file."""
    if not path.is_file():
        return {}
    prompts: dict[tuple[str, str], str] = {}
    for number, line in enumerate(_text(path).split("\n")[1:], 2):
        if not line.strip():
            continue
        fields = line.split("\t")
        kinds = [kind_of(field.strip()) for field in fields[:2]]
        said_to = [prompt.strip() for prompt in fields[4:] if prompt.strip()]
        if len(fields) < 5 or None in kinds or not said_to:
            raise UserError(
                f"{path}:{number}: not query_modality, cand_modality, dataset_name, dataset_id and "
                "prompts with tabs between them"
            )
        direction = "->".join(LETTERS[kind] for kind in kinds if kind)
        prompts.setdefault((fields[3].strip(), direction), said_to[0])
    return prompts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error})") from None
