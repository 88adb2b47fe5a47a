"""The tasks that are named on a command line."""

from __future__ import annotations

import shutil

import pytest

from patch_retriever.errors import UserError
from patch_retriever.retrieval.comparison.chosen import calibration_tasks, read_chosen
from patch_retriever.retrieval.pairs import split_pairs
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.readers.pairs import read_pairs

FEW = ReadOptions(n=5)


def pictures(tasks) -> set:
    return {
        item.picture
        for task in tasks
        for item in (*task.queries, *task.candidates)
        if item.picture is not None
    }


def test_all_tasks_are_there_unless_some_are_asked_for():
    assert len(read_chosen(["scenes"], FEW)) == 10


def test_a_direction_asks_for_all_its_tasks_and_a_name_for_one():
    assert list(read_chosen(["scenes"], FEW, ["t->i"])) == ["t->i full", "t->i short", "t->i web"]
    assert list(read_chosen(["scenes"], FEW, ["t->i web", "t->t"])) == ["t->i web", "t->t"]


def test_an_unknown_task_is_told_with_those_there_are():
    with pytest.raises(UserError, match=r"no task 'i->x' here.*t->i short"):
        read_chosen(["scenes"], FEW, ["t->i", "i->x"])


def test_tasks_of_the_same_name_are_told_apart_by_where_they_are_from(photo_folder, tmp_path):
    here = tmp_path / "more" / "photos"
    shutil.copytree(photo_folder, here, ignore=shutil.ignore_patterns("more"))
    specs = ["scenes", str(photo_folder / "pairs.jsonl"), str(here / "pairs.jsonl")]
    found = read_chosen(specs, FEW, ["i->t", "t->i full"])
    assert list(found) == [
        "t->i full",
        "i->t (scenes)",
        f"i->t ({photo_folder.name}/pairs.jsonl)",
        "i->t (photos/pairs.jsonl)",
    ]
    assert list(read_chosen(specs[:1] * 2, FEW, ["i->t"])) == ["i->t"]
    far = tmp_path / "else" / "photos"
    shutil.copytree(here, far)
    specs = [str(here / "pairs.jsonl"), str(far / "pairs.jsonl")]
    assert list(read_chosen(specs, FEW, ["i->t"])) == [f"i->t ({spec})" for spec in specs]


def test_of_pairs_the_test_split_of_the_seed_is_read(photo_folder):
    source = photo_folder / "pairs.jsonl"
    found = read_chosen([str(source)], ReadOptions(seed=3)).values()
    held_out = split_pairs(read_pairs(source).pairs, 3)["test"]
    assert pictures(found) == {pair.picture for pair in held_out}
    assert {task.split for task in found} == {"test"}


def test_calibration_is_what_a_build_was_fitted_on(photo_folder):
    source = photo_folder / "pairs.jsonl"
    built = {"pairs": str(source), "seed": 3, "skip_bad": False, "scenes": {"calibration": 4}}
    found = calibration_tasks([], built, FEW)
    known = split_pairs(read_pairs(source).pairs, 3)["calibration"]
    assert pictures(found) == {pair.picture for pair in known}
    test = read_chosen([str(source)], ReadOptions(seed=3)).values()
    assert not pictures(found) & pictures(test)
    scenes = calibration_tasks([], built | {"pairs": "scenes"}, FEW)
    assert {task.split for task in scenes} == {"calibration"}
    assert len(scenes[0].queries) == 4


def test_calibration_may_be_named_and_may_be_missing():
    named = calibration_tasks(["scenes"], {}, ReadOptions(split="calibration", n=3))
    assert {(task.split, len(task.queries)) for task in named} == {("calibration", 3)}
    assert calibration_tasks([], {}, FEW) == []
