"""A user's pairs: splits share nothing, and what is relevant is what some pair says."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import PictureFile
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


def test_within_a_split_pairs_keep_their_order():
    for split in split_pairs(UNIQUE, 0).values():
        assert split == sorted(split, key=UNIQUE.index)


def test_another_seed_splits_otherwise():
    assert split_pairs(UNIQUE, 0) != split_pairs(UNIQUE, 1)


def test_copies_of_a_picture_stay_together_whatever_they_are_called(photo_folder):
    path = photo_folder / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i in range(10):
        shutil.copy(photo_folder / f"{i}.png", photo_folder / f"copy-{i}.png")
        rows.append({"image": f"copy-{i}.png", "text": f"said in other words, {i}"})
    path.write_text("\n".join(map(json.dumps, rows)))
    read = read_pairs(path)
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
