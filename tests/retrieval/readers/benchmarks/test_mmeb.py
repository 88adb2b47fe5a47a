"""MMEB's two releases, as VLM2Vec's own loop reads them."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import colour, only_task, refusal, write_png

from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions

TEST = "test-00000-of-00001.parquet"
TOKEN = "<|image_1|>"
CLASSES = ["goldfish", "white shark", "tench"]


def classification(n: int) -> dict:
    """A picture and its class; every class is a candidate, the right one first."""
    order = [CLASSES[n % 3], *(c for c in CLASSES if c != CLASSES[n % 3])]
    return {
        "qry_text": f"{TOKEN}\nRepresent the given image for classification\n",
        "qry_img_path": f"ImageNet-1K/{n}.jpg",
        "tgt_text": order,
        "tgt_img_path": ["", "", ""],
    }


def to_pictures(n: int) -> dict:
    return {
        "qry_text": f"Find me an everyday image that matches the given caption. Caption {n}\n",
        "qry_img_path": "",
        "tgt_text": [f"{TOKEN} Represent the given image.\n"] * 3,
        "tgt_img_path": [f"MSCOCO_t2i/{(n + k) % 4}.jpg" for k in range(3)],
    }


def write(folder: Path, rows: list[dict], name: str = TEST, group: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=group)


@pytest.fixture
def mmeb(tmp_path):
    write(tmp_path / "ImageNet-1K", [classification(n) for n in range(5)])
    write(tmp_path / "MSCOCO_t2i", [to_pictures(n) for n in range(4)])
    for n in range(5):
        write_png(tmp_path / "images" / "ImageNet-1K" / f"{n}.jpg", n)
        write_png(tmp_path / "images" / "MSCOCO_t2i" / f"{n}.jpg", 10 + n)
    return tmp_path


def one(location: object, **options):
    return only_task(f"mmeb:{location}", **options)


def refused(location: object, **options) -> str:
    return refusal(f"mmeb:{location}", **options)


def pairs(folder: Path, cache: Path) -> list[list[tuple[str, str]]]:
    """Each query's candidates, read by `datasets` as VLM2Vec does; the answer first."""
    data = datasets.load_dataset(
        "parquet", data_files=str(folder / TEST), split="train", cache_dir=str(cache)
    )
    return [
        [
            (text.replace(TOKEN, "").strip(), path)
            for text, path in zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        ]
        for row in data
    ]


@pytest.mark.parametrize("name", ["ImageNet-1K", "MSCOCO_t2i"])
def test_pools_and_answers_are_those_of_vlm2vecs_loop(mmeb, tmp_path, name):
    task = one(mmeb / name)
    candidates = dict(zip(task.candidate_ids, task.candidates, strict=True))

    def said(number: str) -> tuple[str, str]:
        item = candidates[number]
        path = item.picture.path.relative_to(mmeb / "images") if item.picture else ""
        return item.text or "", str(path)

    expected = pairs(mmeb / name, tmp_path / "cache")
    assert [[said(c) for c in task.pools[q]] for q in task.query_ids] == expected
    assert [[said(c) for c, grade in task.qrels[q].items() if grade] for q in task.query_ids] == [
        own[:1] for own in expected
    ]
    assert set(map(said, candidates)) == {pair for own in expected for pair in own}


def test_texts_without_the_image_token(mmeb):
    classify = one(f"{mmeb}#ImageNet-1K")
    assert (classify.name, classify.direction) == ("mmeb_ImageNet-1K", "it->t")
    assert {q.text for q in classify.queries} == {"Represent the given image for classification"}
    assert [colour(q.picture) for q in classify.queries] == list(range(5))
    find = one(mmeb / "MSCOCO_t2i")
    assert find.direction == "t->it"
    assert [q.picture for q in find.queries] == [None] * 4
    assert {c.text for c in find.candidates} == {"Represent the given image."}
    assert sorted(colour(c.picture) for c in find.candidates) == [10, 11, 12, 13]


def test_all_datasets_of_a_root(mmeb):
    tasks = read_tasks(f"mmeb:{mmeb}", ReadOptions(limit=2))
    assert [t.name for t in tasks] == ["mmeb_ImageNet-1K", "mmeb_MSCOCO_t2i"]
    assert [len(t.queries) for t in tasks] == [2, 2]
    assert [len(t.candidates) for t in tasks] == [3, 4]
    assert list(tasks[0].pools) == list(tasks[0].query_ids)


def test_one_target_text_for_all_pictures(mmeb):
    rows = [{**to_pictures(n), "tgt_text": "the same"} for n in range(2)]
    write(mmeb / "MSCOCO_t2i", rows)
    task = one(mmeb / "MSCOCO_t2i")
    assert {c.text for c in task.candidates} == {"the same"}
    assert [len(pool) for pool in task.pools.values()] == [3, 3]


def test_instructions_in_their_own_columns(mmeb):
    inst = {"qry_inst": f"{TOKEN} Which class?", "tgt_inst": "A class:"}
    write(mmeb / "ImageNet-1K", [{**classification(0), "qry_text": "", **inst}])
    task = one(mmeb / "ImageNet-1K")
    assert task.queries[0].text == "Which class?"
    assert [c.text for c in task.candidates] == [f"A class: {c}" for c in CLASSES]


def training(n: int) -> dict:
    return {
        "qry": f"{TOKEN}\nquestion {n}",
        "qry_image_path": f"images/A-OKVQA/{n}.jpg",
        "pos_text": f"answer {n % 2}",
        "pos_image_path": "",
        "neg_text": "" if n == 0 else f"wrong {n}",
        "neg_image_path": "",
    }


def test_the_training_release_ranks_positives_among_hard_negatives(mmeb):
    folder = mmeb / "train" / "A-OKVQA"
    write(folder, [training(n) for n in range(4)], "original-00000-of-00001.parquet")
    for n in range(4):
        write_png(mmeb / "train" / "images" / "A-OKVQA" / f"{n}.jpg", n)
    task = one(folder, split="original")
    assert (task.direction, task.pools) == ("it->t", {})
    assert [q.text for q in task.queries] == [f"question {n}" for n in range(4)]
    assert [colour(q.picture) for q in task.queries] == list(range(4))
    texts = [c.text for c in task.candidates]
    assert texts == ["answer 0", "answer 1", "wrong 1", "wrong 2", "wrong 3"]
    assert [texts[int(c)] for own in task.qrels.values() for c in own] == [
        f"answer {n % 2}" for n in range(4)
    ]
    assert "original" in refused(folder)


def test_a_missing_picture_is_named_and_can_be_skipped(mmeb):
    gone = mmeb / "images" / "MSCOCO_t2i" / "1.jpg"
    gone.unlink()
    said = refused(mmeb / "MSCOCO_t2i")
    assert said.startswith(f"{mmeb / 'MSCOCO_t2i' / TEST}:0: {gone}")
    task = one(mmeb / "MSCOCO_t2i", skip_bad=True)
    assert [len(pool) for pool in task.pools.values()] == [2, 3, 2]  # row 1's answer is gone
    assert [q.text[-1] for q in task.queries] == ["0", "2", "3"]
    assert len(task.candidates) == 3
    assert len(task.skipped) == 2  # the picture, once, and the query that it answers


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"tgt_text": []}, "not lists of candidates"),
        ({"tgt_text": ["a"]}, "1 tgt_text, but 3 tgt_img_path"),
        ({"tgt_text": ["a", " ", "b"]}, "candidate 1 has no text and no picture"),
        ({"qry_text": TOKEN, "qry_img_path": ""}, "the query has no text and no picture"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(mmeb, changed, what):
    rows = [classification(n) for n in range(5)]
    write(mmeb / "ImageNet-1K", [*rows[:3], {**rows[3], **changed}, rows[4]])
    said = refused(mmeb / "ImageNet-1K")
    assert said.startswith(f"{mmeb / 'ImageNet-1K' / TEST}:3: ")
    assert what in said
    task = one(mmeb / "ImageNet-1K", skip_bad=True)
    assert [colour(q.picture) for q in task.queries] == [0, 1, 2, 4]
    assert len(task.skipped) == 1


def test_what_is_not_there(mmeb):
    assert "no Parquet files" in refused(mmeb / "images")
    assert "no split original" in refused(mmeb / "ImageNet-1K", split="original")
    line = refused(f"{mmeb}#Nothing")
    assert f"{mmeb}: no dataset Nothing of MMEB here; there are ImageNet-1K" in line
    (mmeb / "images").rename(mmeb / "elsewhere")
    assert "--images" in refused(mmeb)


def test_hub_ids(mmeb, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, repo_type, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        return str(mmeb)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    task = one("TIGER-Lab/MMEB-eval#MSCOCO_t2i", images=mmeb / "images")
    assert task.name == "mmeb_MSCOCO_t2i"
    assert asked == [("TIGER-Lab/MMEB-eval", "dataset", ["MSCOCO_t2i/*.parquet"])]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0<")).filter(str.strip)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=5)), min_size=1))
def test_any_texts_come_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any") / "Some"
    write(
        folder,
        [
            {"qry_text": q, "qry_img_path": "", "tgt_text": t, "tgt_img_path": [""] * len(t)}
            for q, t in rows
        ],
    )
    task = one(folder)
    said = dict(zip(task.candidate_ids, [c.text for c in task.candidates], strict=True))
    assert [q.text for q in task.queries] == [q.strip() for q, _ in rows]
    for name, (_, own) in zip(task.query_ids, rows, strict=True):
        stripped = [text.strip() for text in own]
        assert [said[c] for c in task.pools[name]] == list(dict.fromkeys(stripped))
        assert [said[c] for c in task.qrels[name]] == stripped[:1]
