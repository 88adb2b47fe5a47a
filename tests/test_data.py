"""A build's data from a user's pairs: the same whatever file holds them, and opened again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patch_retriever.config import BuildConfig
from patch_retriever.data import SPLITS, all_items, pairs_data, prepare_pairs
from patch_retriever.errors import UserError
from patch_retriever.progress import no_progress
from stored import write_tar


def rows(folder: Path) -> list[tuple[bytes, str]]:
    found = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
    return [((folder / row["image"]).read_bytes(), row["text"]) for row in found]


def as_they_are(folder: Path) -> Path:
    return folder


def as_parquet(folder: Path) -> Path:
    images, texts = zip(*rows(folder), strict=True)
    pq.write_table(pa.table({"image": images, "text": texts}), folder / "a.parquet")
    return folder / "a.parquet"


def as_tar(folder: Path) -> Path:
    members = {}
    for n, (data, text) in enumerate(rows(folder)):
        members |= {f"{n:02}.png": data, f"{n:02}.txt": text.encode()}
    return write_tar(folder / "a.tar", members)


def as_dataset(folder: Path) -> Path:
    import datasets

    images, texts = zip(*rows(folder), strict=True)
    cells = [{"bytes": data, "path": None} for data in images]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": cells, "text": list(texts)}, features)
    made.save_to_disk(folder / "disk")
    return folder / "disk"


def prepared(source: str, out: Path) -> list:
    """Each split's items by what they hold, after they were written and read again."""
    out.mkdir()
    prepare_pairs(BuildConfig(pairs=source), out, no_progress)
    splits = pairs_data(out, built_in_model=False).splits
    return [
        [(item.text, item.picture and item.picture.content_hash()) for item in splits[split].items]
        for split in SPLITS
    ]


@pytest.mark.parametrize("layout", [as_parquet, as_tar, as_dataset])
def test_splits_are_the_same_whatever_holds_the_pairs(photo_folder, tmp_path_factory, layout):
    out = tmp_path_factory.mktemp("out")
    expected = prepared(str(photo_folder), out / "expected")
    assert prepared(str(layout(photo_folder)), out / "found") == expected
    assert sum(map(len, expected)) == 3 * 60


def test_pairs_of_several_pictures_come_back_whole(photo_folder, tmp_path_factory):
    path = photo_folder / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for n, row in enumerate(rows):
        row["image"] = [row["image"], f"{(n + 1) % 60}.png", f"{n}.png"][: 1 + n % 3]
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path_factory.mktemp("out")
    prepare_pairs(BuildConfig(pairs=str(path)), out, no_progress)
    splits = pairs_data(out, built_in_model=False).splits
    found = {}
    for split in SPLITS:
        for item in splits[split].items:
            if item.kind == "both":
                found[item.text] = [picture.path.name for picture in item.pictures]
            assert item.kind == "text" or item.pictures
    expected = {row["text"]: row["image"] for row in rows}
    assert found == expected
    shown = [
        [p.path.name for p in i.pictures] for s in SPLITS for i in splits[s].items if not i.text
    ]
    assert sorted(shown) == sorted(expected.values())


@pytest.mark.parametrize("layout", [as_they_are, as_parquet, as_tar, as_dataset])
def test_pictures_are_found_from_another_folder(
    photo_folder, tmp_path_factory, monkeypatch, layout
):
    out = tmp_path_factory.mktemp("out")
    source = layout(photo_folder)
    monkeypatch.chdir(source.parent)
    prepare_pairs(BuildConfig(pairs=source.name), out, no_progress)
    monkeypatch.chdir("/")
    for collection in pairs_data(out, built_in_model=False).splits.values():
        assert all(item.picture.open() for item in collection.items if item.picture is not None)


def test_a_picture_that_is_gone_when_a_build_goes_on_is_named(photo_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    source = as_tar(photo_folder)
    prepare_pairs(BuildConfig(pairs=str(source)), out, no_progress)
    source.unlink()
    with pytest.raises(UserError, match=r"a\.tar#\d\d\.png: no such picture"):
        pairs_data(out, built_in_model=False)


def test_pairs_are_items_to_train_an_sae_on(photo_folder):
    found = [item.text or item.picture.read() for item in all_items(str(as_parquet(photo_folder)))]
    assert found == [part for pair in rows(photo_folder) for part in pair]
