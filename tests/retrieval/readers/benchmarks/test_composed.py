"""CIRR and FashionIQ: a picture and a text that changes it."""

from __future__ import annotations

import json

import pytest
from releases import colour, refusal, write_json, write_png

from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions

NAMES = [f"dev-{n}-0-img{n % 2}" for n in range(8)]


def cirr_entry(pair: int, reference: int, target: int) -> dict:
    members = [NAMES[n] for n in range(6)]
    return {
        "pairid": pair,
        "reference": NAMES[reference],
        "target_hard": NAMES[target],
        "target_soft": {NAMES[target]: 1.0, NAMES[7]: -1.0},
        "caption": f"make {reference} look like {target}",
        "img_set": {
            "id": 36,
            "members": members,
            "reference_rank": reference,
            "target_rank": target,
        },
    }


ENTRIES = [cirr_entry(12060, 0, 1), cirr_entry(12062, 2, 3), cirr_entry(12081, 4, 0)]


@pytest.fixture(params=["flat", "cirr"])
def cirr(tmp_path, request):
    base = tmp_path if request.param == "flat" else tmp_path / "cirr"
    write_json(base / "captions" / "cap.rc2.val.json", ENTRIES)
    paths = {name: f"./dev/{name}.png" for name in NAMES}
    write_json(base / "image_splits" / "split.rc2.val.json", paths)
    for number, name in enumerate(NAMES):
        write_png(tmp_path / "dev" / f"{name}.png", number)
    return tmp_path


def refused(reader: str, location: object, **options) -> str:
    return refusal(f"{reader}:{location}", **{"split": "val", **options})


def captions(root):
    return next(root.rglob("cap.rc2.val.json"))


def test_cirr_and_its_subset(cirr):
    whole, subset = read_tasks(f"cirr:{cirr}", ReadOptions(split="val"))
    assert (whole.name, subset.name) == ("cirr_val", "cirr_val_subset")
    for task in (whole, subset):
        assert task.direction == "it->i"
        assert task.query_ids == ["12060", "12062", "12081"]
        assert [q.text for q in task.queries] == [e["caption"] for e in ENTRIES]
        assert [colour(q.picture) for q in task.queries] == [0, 2, 4]
        assert task.candidate_ids == NAMES
        assert [colour(c.picture) for c in task.candidates] == list(range(8))
        assert task.qrels == {str(e["pairid"]): {e["target_hard"]: 1} for e in ENTRIES}
        assert task.excluded == {str(e["pairid"]): {e["reference"]} for e in ENTRIES}
    assert whole.pools == {}
    assert subset.pools == {
        str(e["pairid"]): [m for m in e["img_set"]["members"] if m != e["reference"]]
        for e in ENTRIES
    }


@pytest.mark.parametrize("split", ["test", "test1"])
def test_cirrs_test_has_no_targets(cirr, split):
    assert "--split val" in refused("cirr", cirr, split=split)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"caption": ""}, "caption"),
        ({"reference": None}, "reference"),
        ({"img_set": None}, "img_set"),
        ({"target_hard": NAMES[7]}, "not in its img_set"),
        ({"reference": "dev-999"}, "dev-999 is not among the pictures"),
    ],
)
def test_a_bad_entry_of_cirrs_is_named(cirr, changed, what):
    path = captions(cirr)
    entries = json.loads(path.read_text())
    entries[1].update(changed)
    write_json(path, entries)
    said = refused("cirr", cirr)
    assert said.startswith(f"{path}: entry 1: ")
    assert what in said
    whole, subset = read_tasks(f"cirr:{cirr}", ReadOptions(split="val", skip_bad=True))
    assert whole.query_ids == subset.query_ids == ["12060", "12081"]
    assert len(whole.skipped) == 1


def test_a_missing_picture_of_cirrs(cirr):
    gone = cirr / "dev" / f"{NAMES[3]}.png"
    gone.unlink()
    assert str(gone).removeprefix(str(cirr)) in refused("cirr", cirr)
    whole, subset = read_tasks(f"cirr:{cirr}", ReadOptions(split="val", skip_bad=True, limit=1))
    assert whole.query_ids == ["12060"]
    assert NAMES[3] not in whole.candidate_ids
    assert len(whole.candidates) == 7
    assert NAMES[3] not in subset.pools["12060"]
    assert len(whole.skipped) == 2  # the picture, and the query that it answers


def test_cirr_that_is_not_there(cirr):
    assert "no such file" in refused("cirr", cirr, split="train")
    (cirr / "dev").rename(cirr / "elsewhere")
    assert "--images" in refused("cirr", cirr)


def fashion_entry(reference: str, target: str, *said: str) -> dict:
    return {"target": target, "candidate": reference, "captions": list(said)}


GARMENTS = [f"B00{n}" for n in range(6)]
DRESSES = [
    fashion_entry("B000", "B001", "is a lighter color.", " has no sleeves"),
    fashion_entry("B002", "B003", "is red", "Is more casual?"),
    fashion_entry("B004", "B000", "", "tab\tand\nnewline"),
]


@pytest.fixture
def fashion(tmp_path):
    for category, entries in (("dress", DRESSES), ("toptee", DRESSES[:1])):
        write_json(tmp_path / "captions" / f"cap.{category}.val.json", entries)
        write_json(tmp_path / "image_splits" / f"split.{category}.val.json", GARMENTS)
    for number, name in enumerate(GARMENTS):
        write_png(tmp_path / "images" / f"{name}{'.png' if number % 2 else '.jpg'}", number)
    return tmp_path


def test_fashioniq_by_category(fashion):
    dress, toptee = read_tasks(f"fashioniq:{fashion}", ReadOptions(split="val"))
    assert (dress.name, toptee.name) == ("fashioniq_dress_val", "fashioniq_toptee_val")
    assert [q.text for q in dress.queries] == [
        "is a lighter color and has no sleeves",
        "is red and Is more casual",
        "tab\tand\nnewline",
    ]
    assert [colour(q.picture) for q in dress.queries] == [0, 2, 4]
    assert dress.candidate_ids == GARMENTS
    assert [colour(c.picture) for c in dress.candidates] == list(range(6))
    assert list(dress.qrels.values()) == [{e["target"]: 1} for e in DRESSES]
    assert (dress.direction, dress.excluded, dress.pools) == ("it->i", {}, {})
    assert len(set(dress.query_ids) | set(toptee.query_ids)) == 4
    (only,) = read_tasks(f"fashioniq:{fashion}#toptee", ReadOptions(split="val"))
    assert only.name == toptee.name


def test_fashioniqs_test_has_no_targets(fashion):
    assert "--split val" in refused("fashioniq", fashion, split="test")


def test_a_picture_that_is_gone_from_the_web(fashion):
    (fashion / "images" / "B001.png").unlink()
    assert str(fashion / "images" / "B001.png") in refused("fashioniq", fashion)
    options = ReadOptions(split="val", skip_bad=True)
    (dress,) = read_tasks(f"fashioniq:{fashion}#dress", options)
    assert "B001" not in dress.candidate_ids
    assert dress.query_ids == ["dress-1", "dress-2"]
    assert [colour(q.picture) for q in dress.queries] == [2, 4]
    assert len(dress.skipped) == 2


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"target": None}, "target"),
        ({"captions": "one"}, "list of texts"),
        ({"captions": [" ", "."]}, "no captions"),
        ({"candidate": "B999"}, "B999 is not among the pictures"),
    ],
)
def test_a_bad_entry_of_fashioniqs_is_named(fashion, changed, what):
    path = fashion / "captions" / "cap.dress.val.json"
    write_json(path, [DRESSES[0], {**DRESSES[1], **changed}, DRESSES[2]])
    said = refused("fashioniq", fashion)
    assert said.startswith(f"{path}: entry 1: ")
    assert what in said
    dress, _ = read_tasks(f"fashioniq:{fashion}", ReadOptions(split="val", skip_bad=True))
    assert dress.query_ids == ["dress-0", "dress-2"]
    assert len(dress.skipped) == 1


def test_fashioniq_that_is_not_there(fashion):
    assert "no such files" in refused("fashioniq", fashion, split="train")
    assert "no category hat" in refused("fashioniq", f"{fashion}#hat")
    assert "no such file" in refused("fashioniq", f"{fashion}#shirt")
    (fashion / "images").rename(fashion / "elsewhere")
    assert "--images" in refused("fashioniq", fashion)
