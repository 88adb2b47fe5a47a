"""Tasks by the name that a user gives: which reader takes it, and what its options do."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patch_retriever.errors import UserError
from patch_retriever.retrieval.pairs import SHARES, split_pairs
from patch_retriever.retrieval.readers import FORMATS, read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.readers.pairs import read_pairs
from patch_retriever.scenes.tasks import scenes_collection

SMALL = ReadOptions(n=20)


def says(spec: object, *words: str, **options: object) -> None:
    with pytest.raises(UserError) as caught:
        read_tasks(str(spec), ReadOptions(**options))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# scenes


def test_scenes_are_the_built_in_tasks():
    tasks = read_tasks("scenes", replace(SMALL, split="validation", seed=3))
    expected = scenes_collection("validation", 20, 3).retrieval_tasks()
    assert tasks == list(expected)
    assert {task.split for task in tasks} == {"validation"}
    assert read_tasks("scenes:", SMALL) == read_tasks("scenes", SMALL)


def test_what_scenes_do_not_have_is_named():
    says("scenes:office", "scenes:office: the built-in world is called scenes alone")
    says("scenes", "no split 'all'; there are calibration, validation, test", split="all")


# pairs


def relevant(task) -> dict:
    """What is relevant to what, as texts and contents."""
    content = {}
    for ids, items in ((task.query_ids, task.queries), (task.candidate_ids, task.candidates)):
        for name, item in zip(ids, items, strict=True):
            content[name] = item.text or item.picture.content_hash()
    return {content[q]: {content[c] for c in found} for q, found in task.qrels.items()}


@pytest.mark.parametrize("split", [*SHARES, "all"])
@pytest.mark.parametrize("prefix", ["", "pairs:"])
def test_pairs_are_asked_for_both_ways(photo_folder, prefix, split):
    tasks = read_tasks(f"{prefix}{photo_folder}", ReadOptions(split=split, seed=5))
    pairs = read_pairs(photo_folder).pairs
    pairs = pairs if split == "all" else split_pairs(pairs, 5)[split]
    assert [(task.name, task.direction, task.split) for task in tasks] == [
        ("t->i", "t->i", split),
        ("i->t", "i->t", split),
    ]
    assert relevant(tasks[0]) == {p.text: {p.content} for p in pairs}
    assert relevant(tasks[1]) == {p.content: {p.text} for p in pairs}


def test_fewer_than_fifty_pairs_are_enough_to_test_on(photo_folder):
    path = photo_folder / "pairs.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]))
    assert len(read_tasks(str(path), ReadOptions(split="all"))[0].queries) == 3
    says(path, "3 usable pairs, at least 50 are needed to split them; --split all takes all")
    says(path, "no split 'dev'; pairs have calibration, validation, test, all", split="dev")


def test_a_limit_leaves_the_candidates(photo_folder):
    whole = read_tasks(str(photo_folder), ReadOptions())[0]
    task = read_tasks(str(photo_folder), ReadOptions(limit=4))[0]
    assert task.query_ids == whole.query_ids[:4]
    assert task.queries == whole.queries[:4]
    assert task.qrels == {query: whole.qrels[query] for query in task.query_ids}
    assert (task.candidate_ids, task.candidates) == (whole.candidate_ids, whole.candidates)
    assert read_tasks(str(photo_folder), ReadOptions(limit=10**6))[0] == whole


def test_what_is_left_out_is_told_with_every_task(photo_folder):
    (photo_folder / "7.png").unlink()
    says(photo_folder, "7.png: no such image file")
    tasks = read_tasks(str(photo_folder), ReadOptions(skip_bad=True))
    assert all(len(task.skipped) == 1 and "7.png" in task.skipped[0] for task in tasks)


def test_columns_and_the_place_of_pictures_may_be_named(photo_folder, tmp_path_factory):
    rows = [json.loads(line) for line in (photo_folder / "pairs.jsonl").read_text().splitlines()]
    path = tmp_path_factory.mktemp("table") / "a.parquet"
    columns = {"photo": [r["image"] for r in rows], "words": [r["text"] for r in rows]}
    pq.write_table(pa.table(columns), path)
    options = ReadOptions(images=photo_folder, image_column="photo", text_column="words")
    found = [relevant(task) for task in read_tasks(f"pairs:{path}", options)]
    assert found == [relevant(task) for task in read_tasks(str(photo_folder), ReadOptions())]


def test_datasets_are_pairs(photo_folder, tmp_path_factory):
    import datasets

    rows = [json.loads(line) for line in (photo_folder / "pairs.jsonl").read_text().splitlines()]
    paths = [str(photo_folder / row["image"]) for row in rows]
    made = datasets.Dataset.from_dict({"image": paths, "caption": [r["text"] for r in rows]})
    out = tmp_path_factory.mktemp("disk")
    made.cast_column("image", datasets.Image()).save_to_disk(out)
    found = [relevant(task) for task in read_tasks(f"datasets:{out}", ReadOptions())]
    assert found == [relevant(task) for task in read_tasks(str(photo_folder), ReadOptions())]


# which reader


def test_an_unknown_format_is_named_with_the_known_ones(tmp_path):
    says("flickr:photos", "no format 'flickr'", *FORMATS)
    says(tmp_path / "gone.jsonl", "gone.jsonl: no such pairs file or folder")


def test_a_path_may_hold_a_colon(photo_folder):
    moved = photo_folder.rename(photo_folder.with_name("a: b"))
    assert len(read_tasks(str(moved), ReadOptions())) == 2
    assert len(read_tasks(f"pairs:{moved}", ReadOptions())) == 2
