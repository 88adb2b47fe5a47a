"""The names, numbers and directions of M-BEIR's tasks.

The Hub's repositories and UniIR's files number the directions task0 to task8 (there is no task5).
The code of the paper behind this package says `--task_num 1` to 8 instead. `webqa_task2` is a name
under both, with two meanings, so names here are always the Hub's and the paper's number has to be
asked for: `webqa@paper2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patch_retriever.errors import UserError

DIRECTIONS = {
    0: "t->i",
    1: "t->t",
    2: "t->it",
    3: "i->t",
    4: "i->i",
    6: "it->t",
    7: "it->i",
    8: "it->it",
}
"""The direction of each of the Hub's numbers (UniIR, `MBEIR_TASK`)."""

PAPER_NUMBERS = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 6, 7: 7, 8: 8}
"""The Hub's number of each `--task_num` of the paper's code."""

DATASETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "visualnews": (0, (0, 3)),
    "fashion200k": (1, (0, 3)),
    "webqa": (2, (1, 2)),
    "edis": (3, (2,)),
    "nights": (4, (4,)),
    "oven": (5, (6, 8)),
    "infoseek": (6, (6, 8)),
    "fashioniq": (7, (7,)),
    "cirr": (8, (7,)),
    "mscoco": (9, (0, 3)),
}
"""Each dataset's id, which its query and candidate ids start with, and its tasks' numbers."""


@dataclass(frozen=True)
class MbeirTask:
    """One of M-BEIR's sixteen tasks; `number` is the Hub's."""

    dataset: str
    number: int

    @property
    def name(self) -> str:
        """As the Hub calls it: "mbeir_mscoco_task0"."""
        return f"mbeir_{self.dataset}_task{self.number}"

    @property
    def direction(self) -> str:
        """Of its queries and their positives."""
        return DIRECTIONS[self.number]

    @property
    def dataset_id(self) -> int:
        """What UniIR calls the dataset in ids and instructions."""
        return DATASETS[self.dataset][0]


TASKS = tuple(
    MbeirTask(dataset, number) for dataset, (_, numbers) in DATASETS.items() for number in numbers
)


def find_task(name: str) -> MbeirTask | None:
    """The task called "mbeir_mscoco_task0", "mscoco_task0" or "mscoco@paper1"; None: no such form.

    A dataset's name alone is enough where the dataset has one task.

    Raises:
        UserError: a dataset of M-BEIR's, with a number that it does not have.
    """
    form = re.fullmatch(r"(?:mbeir_)?([a-z0-9]+?)(?:_task(\d+)|@paper(\d+))?", name.lower())
    if form is None or form[1] not in DATASETS:
        return None
    dataset, numbers = form[1], DATASETS[form[1]][1]
    has = " and ".join(f"{dataset}_task{n} ({DIRECTIONS[n]})" for n in numbers)
    if form[3]:
        number = PAPER_NUMBERS.get(int(form[3]))
        if number not in numbers:
            raise UserError(f"{name}: number {form[3]} of the paper's code is no task of it: {has}")
        return MbeirTask(dataset, number)
    if form[2] is None:
        if len(numbers) > 1:
            raise UserError(f"{name}: which task of it? It has {has}")
        return MbeirTask(dataset, numbers[0])
    if int(form[2]) in numbers:
        return MbeirTask(dataset, int(form[2]))
    paper = PAPER_NUMBERS.get(int(form[2]))
    hint = ""
    if paper in numbers:
        hint = (
            f"; if {form[2]} is the number in the paper's code, say {dataset}@paper{form[2]}, "
            f"which is {dataset}_task{paper} ({DIRECTIONS[paper]})"
        )
    raise UserError(f"{name}: M-BEIR has {has}, by the Hub's numbers{hint}")


def task_of(dataset: str, direction: str) -> MbeirTask | None:
    """The task of a dataset with a direction, if there is one."""
    found = (task for task in TASKS if (task.dataset, task.direction) == (dataset, direction))
    return next(found, None)
