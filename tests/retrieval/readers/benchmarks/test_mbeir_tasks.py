"""M-BEIR's names: the Hub's by themselves, the paper's when asked for."""

from __future__ import annotations

import pytest

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import (
    DIRECTIONS,
    PAPER_NUMBERS,
    TASKS,
    MbeirTask,
    find_task,
    task_of,
)

BENCHMARK = """
T1 t->i visualnews mscoco fashion200k; T2 t->t webqa; T3 t->it edis webqa;
T4 i->t visualnews mscoco fashion200k; T5 i->i nights; T6 it->t oven infoseek;
T7 it->i fashioniq cirr; T8 it->it oven infoseek
"""
"""The paper's Table 6."""


def test_the_table_is_that_of_the_paper():
    expected = {}
    for line in BENCHMARK.split(";"):
        number, direction, *names = line.split()
        for dataset in names:
            expected[dataset, direction] = int(number[1:])
    assert {(task.dataset, task.direction) for task in TASKS} == set(expected)
    for (dataset, direction), number in expected.items():
        assert find_task(f"{dataset}@paper{number}") == task_of(dataset, direction)


def test_directions_are_those_of_mteb():
    """mteb's own metadata say which direction each repository has."""
    mteb = pytest.importorskip("mteb")
    tasks = [task for task in mteb.get_tasks() if "mbeir_" in task.metadata.dataset["path"]]
    assert len(tasks) >= 14
    for task in tasks:
        name = task.metadata.dataset["path"].split("/")[1]
        found = find_task(name)
        assert found.name == name
        assert found.direction == task.metadata.category.replace("2", "->")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_each_name_is_found(task):
    assert find_task(task.name) == find_task(task.name.removeprefix("mbeir_").upper()) == task
    (paper,) = (paper for paper, hub in PAPER_NUMBERS.items() if hub == task.number)
    assert find_task(f"{task.dataset}@paper{paper}") == task
    assert DIRECTIONS[task.number] == task.direction


def test_the_name_that_both_numberings_have_is_the_hubs():
    assert find_task("webqa_task2").direction == "t->it"
    assert find_task("webqa@paper2").direction == "t->t"


def test_a_dataset_with_one_task_needs_no_number():
    assert find_task("nights") == MbeirTask("nights", 4)
    with pytest.raises(UserError, match=r"which task.*mscoco_task0 \(t->i\)"):
        find_task("mscoco")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mbeir_mscoco_task4", "mscoco@paper4, which is mscoco_task3 (i->t)"),
        ("mscoco_task1", "mscoco@paper1, which is mscoco_task0 (t->i)"),
        ("nights_task5", "nights@paper5, which is nights_task4 (i->i)"),
        ("edis_task3", "edis@paper3, which is edis_task2 (t->it)"),
    ],
)
def test_a_number_of_the_papers_alone_says_how_to_ask_for_it(name, hint):
    with pytest.raises(UserError) as raised:
        find_task(name)
    assert hint in str(raised.value)


@pytest.mark.parametrize("name", ["mscoco_task7", "mscoco_task99", "mscoco@paper7", "cirr@paper0"])
def test_a_number_that_is_in_neither_is_refused_without_a_hint(name):
    with pytest.raises(UserError) as raised:
        find_task(name)
    assert "; if" not in str(raised.value)


@pytest.mark.parametrize("name", ["flickr_task0", "a folder", "mscoco_tasks", ""])
def test_other_names_are_no_tasks(name):
    assert find_task(name) is None
