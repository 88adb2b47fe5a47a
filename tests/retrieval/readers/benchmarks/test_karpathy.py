"""Flickr30k and COCO in Karpathy's splits."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import colour, refusal, write_json, write_png

from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions

SPLITS = ("train", "test", "restval", "test", "val", "test")


def sentence(imgid: int, sentid: int, raw: str) -> dict:
    return {"tokens": raw.lower().split(), "raw": raw, "imgid": imgid, "sentid": sentid}


def flickr_image(number: int, split: str) -> dict:
    raws = [f"Picture {number} said in way {n}." for n in range(5)]
    ids = [5 * number + n for n in range(5)]
    return {
        "sentids": ids,
        "imgid": number,
        "sentences": [sentence(number, i, raw) for i, raw in zip(ids, raws, strict=True)],
        "split": split,
        "filename": f"{1000 + number}.jpg",
    }


def coco_image(number: int, split: str) -> dict:
    own = {"filepath": "val2014" if number % 2 else "train2014", "cocoid": 391895 + number}
    return {**flickr_image(number, split), **own, "filename": f"COCO_{number}.jpg"}


@pytest.fixture
def flickr(tmp_path):
    images = [flickr_image(n, split) for n, split in enumerate(SPLITS)]
    write_json(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for number, image in enumerate(images):
        write_png(tmp_path / "flickr30k-images" / image["filename"], number)
    return tmp_path


@pytest.fixture
def coco(tmp_path):
    images = [coco_image(n, split) for n, split in enumerate(SPLITS)]
    write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for number, image in enumerate(images):
        write_png(tmp_path / "photos" / image["filepath"] / image["filename"], number)
    return tmp_path


def refused(location: object, **options) -> str:
    return refusal(f"karpathy:{location}", **options)


@pytest.mark.parametrize("split", ["test", "val", "train", "restval"])
def test_both_directions_are_those_of_a_plain_loop(flickr, split):
    path = flickr / "dataset_flickr30k.json"
    t2i, i2t = read_tasks(f"karpathy:{path}", ReadOptions(split=split))
    assert (t2i.name, t2i.direction) == ("flickr30k_t2i", "t->i")
    assert (i2t.name, i2t.direction) == ("flickr30k_i2t", "i->t")
    captions, of_picture = [], defaultdict(dict)
    for image in json.loads(path.read_text())["images"]:
        if image["split"] == split:
            for said in image["sentences"]:
                captions.append((str(said["sentid"]), said["raw"], image["filename"]))
                of_picture[image["filename"]][str(said["sentid"])] = 1
    asked = [(i, q.text) for i, q in zip(t2i.query_ids, t2i.queries, strict=True)]
    answers = [(i, c.text) for i, c in zip(i2t.candidate_ids, i2t.candidates, strict=True)]
    assert asked == answers == [(i, raw) for i, raw, _ in captions]
    assert t2i.qrels == {i: {name: 1} for i, _, name in captions}
    assert i2t.qrels == dict(of_picture)
    assert list(t2i.candidate_ids) == list(i2t.query_ids) == list(of_picture)
    shown = {colour(picture.picture) for picture in t2i.candidates}
    assert shown == {n for n, s in enumerate(SPLITS) if s == split}


def test_coco_has_folders_of_pictures(coco):
    t2i, i2t = read_tasks(f"karpathy:{coco}", ReadOptions(images=coco / "photos", limit=4))
    assert (t2i.name, i2t.name) == ("coco_t2i", "coco_i2t")
    assert list(t2i.candidate_ids) == [
        "val2014/COCO_1.jpg",
        "val2014/COCO_3.jpg",
        "val2014/COCO_5.jpg",
    ]
    assert [colour(c.picture) for c in t2i.candidates] == [1, 3, 5]
    assert len(t2i.queries) == 4
    assert len(i2t.queries) == 3
    assert len(i2t.candidates) == 15
    assert "--images" in refused(coco)


def test_a_missing_picture_is_named_and_can_be_skipped(flickr):
    gone = flickr / "flickr30k-images" / "1003.jpg"
    gone.unlink()
    said = refused(flickr)
    assert str(gone) in said
    assert "images[3]" in said
    t2i, i2t = read_tasks(f"karpathy:{flickr}", ReadOptions(skip_bad=True))
    assert list(t2i.candidate_ids) == ["1001.jpg", "1005.jpg"]
    assert len(t2i.queries) == len(i2t.candidates) == 10
    assert len(t2i.skipped) == len(i2t.skipped) == 1


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"filename": None}, "no filename"),
        ({"split": None}, "no split"),
        ({"sentences": []}, "no sentences"),
        ({"sentences": [{"raw": " "}]}, "no text in sentences[0]"),
        ({"filename": "1001.jpg"}, "1001.jpg is there twice"),
        ({"sentences": [sentence(3, 5, "same id")]}, "sentid 5 is there twice"),
    ],
)
def test_a_bad_entry_is_named(flickr, changed, what):
    path = flickr / "dataset_flickr30k.json"
    content = json.loads(path.read_text())
    content["images"][3].update(changed)
    write_json(path, content)
    said = refused(flickr)
    assert said.startswith(f"{path}: images[3]")
    assert what in said
    t2i, _ = read_tasks(f"karpathy:{flickr}", ReadOptions(skip_bad=True))
    assert len(t2i.queries) == 10
    assert len(t2i.skipped) == 1


def test_what_is_not_there(flickr):
    assert "test (3)" in refused(flickr, split="dev")
    assert "no such file" in refused(flickr / "other.json")
    write_json(flickr / "dataset_coco.json", {})
    assert "name the file" in refused(flickr)
    assert "images" in refused(flickr / "dataset_coco.json")
    (flickr / "dataset_coco.json").write_text("{")
    assert "not readable as JSON" in refused(flickr / "dataset_coco.json")


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    raws=st.lists(
        st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_any_captions_come_back(tmp_path_factory, raws):
    root = tmp_path_factory.mktemp("any")
    images = []
    for n, own in enumerate(raws):
        write_png(root / f"{n}.jpg", n)
        said = [{"raw": raw, "sentid": 10 * n + k} for k, raw in enumerate(own)]
        images.append({"filename": f"{n}.jpg", "split": "test", "sentences": said})
    write_json(root / "dataset_any.json", {"images": images})
    t2i, i2t = read_tasks(f"karpathy:{root}", ReadOptions())
    assert t2i.name == "dataset_any_t2i"
    assert [q.text for q in t2i.queries] == [raw for own in raws for raw in own]
    for n, own in enumerate(raws):
        found = [
            dict(zip(i2t.candidate_ids, i2t.candidates, strict=True))[c].text
            for c in i2t.qrels[f"{n}.jpg"]
        ]
        assert found == own
