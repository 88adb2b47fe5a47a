"""Tasks over scenes: all directions, disjoint splits, and relevance that lists all that fits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest

from patch_retriever.retrieval.collection import DIRECTIONS, Collection, Task
from patch_retriever.scenes.language import _SYNONYMS
from patch_retriever.scenes.tasks import ScenePicture, scenes_collection
from patch_retriever.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    make_scene,
    near_misses,
)

SPLITS = ("calibration", "validation", "test")
N = 40


@cache
def collection(split: str = "test", n: int = N, seed: int = 0) -> Collection:
    return scenes_collection(split, n, seed)


TASKS = [task.name for task in collection().tasks]


def named(name: str) -> Task:
    return next(task for task in collection().tasks if task.name == name)


def item(number: int):
    return collection().items[number]


def one_of(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


PLAIN = {synonym: word for word, synonym in _SYNONYMS.items()}
THING = re.compile(
    rf"(?:({one_of(SIZES)}) ({one_of(FILLS)}) )?\b({one_of(COLOURS)}) ({one_of(SHAPES)})\b"
    rf"(?: at the ({one_of(PLACES)}))?"
)


def claims(text: str) -> list[tuple[str, str, str, str, str]]:
    """(size, fill, colour, shape, place) of every thing that a text names, "" for what is open."""
    return THING.findall(re.sub(rf"\b({one_of(PLAIN)})\b", lambda found: PLAIN[found[0]], text))


def background(text: str) -> str:
    found = re.search(rf"on an? ({one_of(BACKGROUNDS)}) (?:background|backdrop)", text)
    return found[1] if found else ""


def facts(thing: Thing) -> tuple[str, str, str, str, str]:
    return thing.size, thing.fill, thing.colour, thing.shape, PLACES[thing.place]


def true_of(text: str, scene: Scene) -> bool:
    """Whether a caption is true of a scene; one that says where things are names them all."""
    said = claims(text)
    if background(text) not in ("", scene.background):
        return False
    if said[0][-1] and len(said) != len(scene.things):
        return False
    return any(
        all(
            a in ("", b)
            for one, thing in zip(said, things, strict=True)
            for a, b in zip(one, facts(thing), strict=True)
        )
        for things in permutations(scene.things, len(said))
    )


def described(text: str) -> Scene:
    """The one scene that a complete caption is about."""
    things = [
        Thing(PLACES.index(place), shape, colour, size, fill)
        for size, fill, colour, shape, place in claims(text)
    ]
    return make_scene(*things, background=background(text))


def shown(number: int) -> Scene:
    """The scene that a document of the gallery shows or describes."""
    document = item(number)
    if isinstance(document.picture, ScenePicture):
        return document.picture.scene
    return described(document.text)


def follow(instruction: str, source: Scene) -> Scene:
    """What an instruction makes of the scene that it is said of."""
    found = re.fullmatch(r"make the background (\w+)", instruction)
    if found:
        return replace(source, background=found[1])
    said = claims(instruction)
    if instruction.startswith("add "):
        (size, fill, colour, shape, place), *_ = said
        new = Thing(PLACES.index(place), shape, colour, size, fill)
        return make_scene(*source.things, new, background=source.background)
    _, _, colour, shape, place = said[0]
    (thing,) = (
        t
        for t in source.things
        if (t.colour, t.shape) == (colour, shape) and place in ("", PLACES[t.place])
    )
    rest = [t for t in source.things if t != thing]
    match instruction.split()[0]:
        case "remove":
            new = []
        case "move":
            new = [replace(thing, place=PLACES.index(instruction.split(" to the ")[1]))]
        case "replace":
            new = [replace(thing, colour=said[1][2], shape=said[1][3])]
        case "make":
            new = [replace(thing, colour=instruction.split()[-1])]
    return make_scene(*rest, *new, background=source.background)


def expected(query: int, document: int) -> bool:
    """Whether `document` answers `query`, from what they show and say alone."""
    asked = item(query)
    match asked.kind:
        case "text":
            return true_of(asked.text, shown(document))
        case "image":
            return asked.picture.scene == shown(document)
        case "both":
            return follow(asked.text, asked.picture.scene) == shown(document)


@pytest.mark.parametrize("name", TASKS)
def test_every_document_that_fits_is_relevant_and_no_other(name):
    task = named(name)
    for query, relevant in zip(task.queries, task.relevant, strict=True):
        assert list(relevant) == [
            position
            for position, document in enumerate(task.documents)
            if expected(query, document)
        ], item(query)


def test_some_captions_have_several_answers():
    answers = [len(r) for name in ("t->i short", "t->i web") for r in named(name).relevant]
    assert max(answers) > 1


def test_all_eight_directions_are_there():
    assert {task.direction for task in collection().tasks} == set(DIRECTIONS)
    assert len(DIRECTIONS) == 8


KINDS = {"t": "text", "i": "image", "it": "both"}


@pytest.mark.parametrize("name", TASKS)
def test_a_direction_says_what_queries_and_documents_are(name):
    task = named(name)
    asking, answering = task.direction.split("->")
    assert {item(q).kind for q in task.queries} == {KINDS[asking]}
    assert {item(d).kind for d in task.documents} == {KINDS[answering]}


@pytest.mark.parametrize("name", TASKS)
def test_queries_and_galleries_have_their_sizes(name):
    task = named(name)
    assert len(task.queries) == N
    assert len(set(task.documents)) == len(task.documents) == 3 * N


@pytest.mark.parametrize("name", TASKS)
def test_no_query_is_among_its_documents(name):
    task = named(name)
    documents = {(item(d).text, item(d).picture) for d in task.documents}
    assert not {(item(q).text, item(q).picture) for q in task.queries} & documents


def test_every_scene_that_is_asked_about_has_a_near_miss_in_the_gallery():
    task = named("t->i full")
    gallery = {shown(d) for d in task.documents}
    for query in task.queries:
        assert set(near_misses(described(item(query).text))) & gallery


def scenes_in(split: str) -> Counter[Scene]:
    found = Counter(i.picture.scene for i in collection(split).items if i.picture is not None)
    complete = [i.text for i in collection(split).items if i.text and background(i.text)]
    found.update(described(text) for text in complete if claims(text) and claims(text)[0][-1])
    return found


def test_the_collections_of_the_splits_share_no_scene():
    seen = [set(scenes_in(split)) for split in SPLITS]
    assert all(len(scenes) >= 2 * N for scenes in seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_lies_in_its_split(split):
    assert {scene.split for scene in scenes_in(split)} == {split}
    assert collection(split).split == split


def test_a_seed_always_gives_the_same_collection():
    assert scenes_collection("test", N, 0) == collection()


def test_another_seed_gives_other_scenes():
    first, second = (
        {i.picture.scene for i in c.items if i.picture is not None}
        for c in (collection(), scenes_collection("test", N, 1))
    )
    assert len(first & second) < len(first) / 4


def test_another_process_gives_the_same_collection():
    code = (
        "from patch_retriever.scenes.tasks import scenes_collection as c;"
        "print(c('validation', 8, 3))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{scenes_collection('validation', 8, 3)}\n"}


def test_near_misses_are_picked_at_random():
    task = named("i->t")
    asked = [shown(q) for q in task.queries]
    near = [shown(d) for d in task.documents[N : 2 * N]]
    changed = Counter(
        "background" if a.background != b.background else "thing"
        for a, b in zip(asked, near, strict=True)
    )
    assert set(changed) == {"background", "thing"}
