"""A user's pairs: every layout is read, every fault is named, splits share nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patch_retriever.errors import UserError
from patch_retriever.pictures import PictureFile
from patch_retriever.retrieval.evaluate import evaluate_embeddings
from patch_retriever.retrieval.pairs import (
    SHARES,
    Pair,
    pairs_collection,
    split_pairs,
    texts_are_shared,
)
from patch_retriever.retrieval.readers.pairs import read_pairs

steady = settings(deadline=None, derandomize=True)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def rewrite(folder: Path, changed: list[dict], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in changed))
    return path


def texts(source: Path) -> list[str]:
    return [pair.text for pair in read_pairs(source).pairs]


# layouts


def test_a_jsonl_file_is_read_with_paths_relative_to_it(photo_folder, monkeypatch):
    monkeypatch.chdir("/")
    read = read_pairs(photo_folder / "pairs.jsonl")
    assert [pair.text for pair in read.pairs] == [row["text"] for row in rows(photo_folder)]
    assert [pair.picture.path for pair in read.pairs] == [
        photo_folder / row["image"] for row in rows(photo_folder)
    ]
    assert read.skipped == ()


def test_a_folder_is_read_by_its_jsonl(photo_folder):
    assert read_pairs(photo_folder) == read_pairs(photo_folder / "pairs.jsonl")


def test_a_folder_with_metadata_jsonl_is_read_as_datasets_does(photo_folder):
    expected = texts(photo_folder)
    changed = [{"file_name": row["image"], "text": row["text"]} for row in rows(photo_folder)]
    rewrite(photo_folder, changed, "metadata.jsonl")
    (photo_folder / "pairs.jsonl").unlink()
    assert texts(photo_folder) == expected


def with_sidecars(folder: Path) -> Path:
    for row in rows(folder):
        (folder / row["image"]).with_suffix(".txt").write_text(row["text"] + "\n")
    (folder / "pairs.jsonl").unlink()
    return folder


def test_pictures_with_txt_files_beside_them_are_read(photo_folder):
    expected = {row["image"]: row["text"] for row in rows(photo_folder)}
    read = read_pairs(with_sidecars(photo_folder))
    assert {pair.picture.path.name: pair.text for pair in read.pairs} == expected


def test_sidecars_are_found_in_folders_below_and_beside_any_format(photo_folder):
    with_sidecars(photo_folder)
    (photo_folder / "more").mkdir()
    Image.new("RGB", (9, 9), "red").save(photo_folder / "more" / "a.JPG", "JPEG")
    (photo_folder / "more" / "a.txt").write_text("a red one below")
    assert "a red one below" in texts(photo_folder)


def test_absolute_paths_are_taken_as_they_are(photo_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pairs.jsonl"
    changed = [{**row, "image": str(photo_folder / row["image"])} for row in rows(photo_folder)]
    elsewhere.write_text("\n".join(map(json.dumps, changed)))
    assert texts(elsewhere) == texts(photo_folder)


def test_empty_lines_are_no_rows_and_texts_are_trimmed(photo_folder):
    changed = rows(photo_folder)
    changed[0]["text"] = "  a red one \n"
    path = rewrite(photo_folder, changed)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n") + "\n\n")
    read = texts(path)
    assert (len(read), read[0]) == (60, "a red one")


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_a_line_separator_inside_a_text_does_not_end_the_row(photo_folder, separator):
    changed = rows(photo_folder)
    changed[3]["text"] = f"copied{separator}from the web"
    path = photo_folder / "pairs.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in changed]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(texts(path)) == 60


def test_windows_line_ends_are_read(photo_folder):
    path = photo_folder / "pairs.jsonl"
    expected = texts(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert texts(path) == expected


def test_progress_sees_every_row(photo_folder):
    seen = []

    def progress(steps, total):
        seen.append(total)
        for step in steps:
            seen.append(step)
            yield step

    read_pairs(photo_folder, progress=progress)
    assert seen[0] == 60
    assert len(seen) == 61


# faults


def says(source: Path, *words: str, skip_bad: bool = False) -> str:
    """The one line of the error, which holds all `words`."""
    with pytest.raises(UserError) as caught:
        read_pairs(source, skip_bad)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


def test_a_missing_file_is_named(tmp_path):
    says(tmp_path / "nowhere.jsonl", "nowhere.jsonl: no such pairs file")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    says(tmp_path / "empty.jsonl", "empty.jsonl: no pairs in it", '"image"')


def test_an_empty_folder_is_named(tmp_path):
    says(tmp_path, f"{tmp_path}: no pairs in it")


@pytest.mark.parametrize("line", ["{not json", "[1, 2]", "null", '"a text"', "7"])
def test_a_row_that_is_no_object_is_named_with_its_line(photo_folder, line):
    path = photo_folder / "pairs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    says(path, "pairs.jsonl:3: not a JSON object")


def test_a_file_that_is_no_text_is_named(photo_folder):
    says(photo_folder / "0.png", "0.png: cannot be read", "not a UTF-8 text file")


@pytest.mark.parametrize("text", ["", "  \n", None, 7, [], ["a", " "], ["a", 7]])
def test_a_row_without_text_is_named(photo_folder, text):
    changed = rows(photo_folder)
    changed[4]["text"] = text
    says(rewrite(photo_folder, changed), "pairs.jsonl:5: no text", "--skip-bad")


@pytest.mark.parametrize("image", ["", None, 7])
def test_a_row_without_image_is_named(photo_folder, image):
    changed = rows(photo_folder)
    changed[4]["image"] = image
    says(rewrite(photo_folder, changed), "pairs.jsonl:5: no image", "--skip-bad")


def test_a_missing_picture_is_named(photo_folder):
    (photo_folder / "7.png").unlink()
    says(photo_folder, "pairs.jsonl:8", "7.png: no such image file", "--skip-bad")


def truncate(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def test_a_truncated_picture_is_named(photo_folder):
    truncate(photo_folder / "7.png")
    says(photo_folder, "pairs.jsonl:8", "7.png: not a readable image", "--skip-bad")


def test_a_file_that_is_no_picture_is_named(photo_folder):
    (photo_folder / "7.png").write_text("hello")
    says(photo_folder, "pairs.jsonl:8", "7.png: not a readable image", "--skip-bad")


def test_a_picture_without_a_txt_file_is_named(photo_folder):
    (with_sidecars(photo_folder) / "7.txt").unlink()
    says(photo_folder, "7.png: no text", "--skip-bad")


def test_a_txt_file_that_is_not_utf8_is_named(photo_folder):
    (with_sidecars(photo_folder) / "7.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "7.txt" in says(photo_folder) or "7.png" in says(photo_folder)


def test_fewer_than_fifty_pairs_are_too_few(photo_folder):
    path = rewrite(photo_folder, rows(photo_folder)[:49])
    says(path, "pairs.jsonl: 49 usable pairs", "at least 50")


def test_fifty_pairs_are_enough(photo_folder):
    path = rewrite(photo_folder, rows(photo_folder)[:50])
    assert len(read_pairs(path).pairs) == 50


# skip_bad


def test_skip_bad_leaves_out_names_and_goes_on(photo_folder):
    changed = rows(photo_folder)
    changed[0]["text"] = ""
    del changed[1]["image"]
    path = rewrite(photo_folder, changed)
    (photo_folder / "2.png").unlink()
    truncate(photo_folder / "3.png")
    (photo_folder / "4.png").write_text("hello")
    read = read_pairs(path, skip_bad=True)
    assert [pair.text for pair in read.pairs] == [row["text"] for row in changed[5:]]
    assert len(read.skipped) == 5
    for line, named in zip(
        read.skipped, ["no text", "no image", "2.png", "3.png", "4.png"], strict=True
    ):
        assert named in line
        assert "\n" not in line


def test_skip_bad_leaves_out_a_row_that_is_no_object(photo_folder):
    path = photo_folder / "pairs.jsonl"
    path.write_text("{not json\n" + path.read_text())
    read = read_pairs(path, skip_bad=True)
    assert len(read.pairs) == 60
    assert len(read.skipped) == 1
    assert "pairs.jsonl:1" in read.skipped[0]


def test_skip_bad_leaves_out_a_txt_file_that_is_not_utf8(photo_folder):
    (with_sidecars(photo_folder) / "7.txt").write_bytes("caf\xe9".encode("latin-1"))
    read = read_pairs(photo_folder, skip_bad=True)
    assert (len(read.pairs), len(read.skipped)) == (59, 1)


def test_skip_bad_still_needs_fifty(photo_folder):
    for i in range(15):
        (photo_folder / f"{i}.png").unlink()
    says(photo_folder, "45 usable pairs", "15 left out", skip_bad=True)


# splits


def pair(text: str, content: str) -> Pair:
    return Pair(PictureFile(Path(f"{content}.png")), text, content)


@st.composite
def pairs_with_repeats(draw: st.DrawFn) -> list[Pair]:
    """Pairs in which some pictures and some texts, or all texts, come up several times."""
    number = st.integers(0, draw(st.integers(0, 40)))
    repeated = draw(st.lists(st.tuples(number, number), max_size=40))
    single = [(1000 + i, 1000 + i) for i in range(draw(st.integers(60, 90)))]
    drawn = draw(st.permutations([*repeated, *single]))
    labels = draw(st.booleans())
    return [pair(f"text {t % 5 if labels else t}", f"{content:04}") for t, content in drawn]


@steady
@given(pairs_with_repeats(), st.integers(0, 1000))
def test_every_pair_is_in_one_split_and_a_picture_too(pairs, seed):
    splits = split_pairs(pairs, seed)
    assert list(splits) == list(SHARES)
    assert Counter(p for split in splits.values() for p in split) == Counter(pairs)
    pictures = [{p.content for p in split} for split in splits.values()]
    assert sum(map(len, pictures)) == len(set.union(*pictures))


@steady
@given(pairs_with_repeats(), st.integers(0, 1000))
def test_texts_are_disjoint_unless_most_are_shared(pairs, seed):
    found = [{p.text for p in split} for split in split_pairs(pairs, seed).values()]
    disjoint = sum(map(len, found)) == len(set.union(*found))
    assert disjoint or texts_are_shared(pairs)


@steady
@given(pairs_with_repeats(), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_seed_always_gives_the_same_splits(pairs, seed, rng):
    assert split_pairs(pairs, seed) == split_pairs(list(pairs), seed)
    unique = list({p.content: p for p in pairs}.values())
    unique = [Pair(p.picture, f"{p.text} {p.content}", p.content) for p in unique]
    shuffled = rng.sample(unique, len(unique))
    before, after = split_pairs(unique, seed), split_pairs(shuffled, seed)
    assert {s: set(p) for s, p in before.items()} == {s: set(p) for s, p in after.items()}


UNIQUE = [pair(f"text {i}", f"{i:03}") for i in range(100)]


def test_splits_have_their_shares():
    sizes = {split: len(found) for split, found in split_pairs(UNIQUE, 0).items()}
    assert sizes == {"calibration": 50, "validation": 20, "test": 30}


def test_another_seed_splits_otherwise():
    assert split_pairs(UNIQUE, 0) != split_pairs(UNIQUE, 1)


def test_copies_of_a_picture_stay_together_whatever_they_are_called(photo_folder):
    changed = rows(photo_folder)
    for i in range(10):
        shutil.copy(photo_folder / f"{i}.png", photo_folder / f"copy-{i}.png")
        changed.append({"image": f"copy-{i}.png", "text": f"said in other words, {i}"})
    read = read_pairs(rewrite(photo_folder, changed))
    for seed in range(5):
        split_of = {
            p.picture.path.name: name
            for name, split in split_pairs(read.pairs, seed).items()
            for p in split
        }
        assert len(split_of) == 70
        assert all(split_of[f"copy-{i}.png"] == split_of[f"{i}.png"] for i in range(10))


def test_pictures_linked_by_texts_and_copies_stay_together():
    linked = [pair("a", "x"), pair("a", "y"), pair("b", "y"), pair("b", "z")]
    for seed in range(10):
        splits = split_pairs([*UNIQUE, *linked], seed)
        assert sum(any(p in linked for p in split) for split in splits.values()) == 1


def test_texts_that_differ_in_case_and_space_are_one():
    same = [pair("A  red star", "x"), pair("a red STAR ", "y")]
    for seed in range(10):
        splits = split_pairs([*UNIQUE, *same], seed)
        assert sum(any(p in same for p in split) for split in splits.values()) == 1


def test_texts_are_shared_when_there_are_few_of_them():
    labels = [pair(f"class {i % 5}", f"{i:03}") for i in range(60)]
    assert texts_are_shared(labels)
    assert not texts_are_shared(UNIQUE)
    found = split_pairs(labels, 0)
    assert all(
        {p.text for p in split} == {f"class {i}" for i in range(5)} for split in found.values()
    )


CHAIN = [pair(f"text {i + k}", f"{i:03}") for i in range(60) for k in (0, 1)]
COPIES = [pair(f"text {i}", "same") for i in range(60)]


@pytest.mark.parametrize("linked", [CHAIN, COPIES], ids=["chain", "copies"])
def test_pairs_that_are_all_linked_cannot_be_split_and_that_is_told(linked):
    with pytest.raises(UserError, match="split"):
        split_pairs(linked, 0)


# tasks


def truth(pairs: list[Pair]) -> set[tuple[str, str]]:
    """(text, content of a picture) of all pairs: what is true of what."""
    return {(p.text, p.content) for p in pairs}


@steady
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9))
def test_what_is_relevant_is_every_picture_and_text_that_some_pair_puts_together(numbers):
    pairs = [pair(f"text {text}", str(content)) for text, content in numbers]
    collection = pairs_collection("test", pairs)
    content = {p.picture: p.content for p in pairs}
    for task in collection.tasks:
        for query, relevant in zip(task.queries, task.relevant, strict=True):
            expected = []
            for position, document in enumerate(task.documents):
                asked = [collection.items[i] for i in (query, document)]
                (text,) = (item.text for item in asked if item.text is not None)
                (picture,) = (item.picture for item in asked if item.picture is not None)
                if (text, content[picture]) in truth(pairs):
                    expected.append(position)
            assert list(relevant) == expected


def test_a_model_that_knows_every_picture_finds_it_though_each_has_five_captions():
    pairs = [pair(f"caption {i} of {n}", f"{n:03}") for n in range(8) for i in range(5)]
    collection = pairs_collection("test", pairs)
    number = {p.text: int(p.content) for p in pairs} | {p.picture: int(p.content) for p in pairs}
    known = [number[i.text] if i.text is not None else number[i.picture] for i in collection.items]
    embeddings_nd = np.eye(8, dtype=np.float32)[known]
    found = evaluate_embeddings(embeddings_nd, embeddings_nd, collection)
    assert {name: h.mean() for name, h in found.hits_by_task.items()} == {"t->i": 1, "i->t": 1}


def test_both_directions_are_asked_for_over_all_pairs():
    collection = pairs_collection("validation", [*UNIQUE, pair("TEXT 0", "x")])
    assert collection.split == "validation"
    assert [task.direction for task in collection.tasks] == ["t->i", "i->t"]
    by_text, by_picture = collection.tasks
    assert (len(by_text.queries), len(by_text.documents)) == (100, 101)
    assert (len(by_picture.queries), len(by_picture.documents)) == (101, 100)
    assert by_text.relevant[0] == (0, 100)
    assert by_picture.relevant[100] == (0,)


def test_there_is_an_item_with_both_for_every_pair():
    collection = pairs_collection("calibration", UNIQUE)
    both = [(item.text, item.picture) for item in collection.items if item.kind == "both"]
    assert both == [(p.text, p.picture) for p in UNIQUE]
    asked = {i for task in collection.tasks for i in (*task.queries, *task.documents)}
    assert not any(collection.items[i].kind == "both" for i in asked)
