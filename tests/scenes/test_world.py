"""Scenes: drawn from a seed, each in one split, with near misses and edits."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.scenes.language import edit_instruction
from patch_retriever.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    EDIT_KINDS,
    FILLS,
    PLACES,
    SHAPES,
    SIZES,
    SPLIT_SHARES,
    Edit,
    Scene,
    Thing,
    make_scene,
    near_misses,
    sample_edit,
    sample_scene,
)

SPLITS = sorted(SPLIT_SHARES)
SEEDS = st.integers(0, 2**32)
steady = settings(deadline=None, derandomize=True)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    places = draw(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))
    things = [
        Thing(place, *(draw(st.sampled_from(values)) for values in (SHAPES, COLOURS, SIZES, FILLS)))
        for place in places
    ]
    return make_scene(*things, background=draw(st.sampled_from(BACKGROUNDS)))


@steady
@given(SEEDS, st.sampled_from([None, *SPLITS]))
def test_a_seed_always_gives_the_same_scenes(seed, split):
    first, second = random.Random(seed), random.Random(seed)
    assert [sample_scene(first, split) for _ in range(4)] == [
        sample_scene(second, split) for _ in range(4)
    ]


@steady
@given(SEEDS)
def test_a_seed_always_gives_the_same_edits(seed):
    source = sample_scene(random.Random(seed))
    first, second = random.Random(seed), random.Random(seed)
    assert [sample_edit(first, source) for _ in range(4)] == [
        sample_edit(second, source) for _ in range(4)
    ]


@steady
@given(SEEDS)
def test_a_sampled_scene_has_one_to_four_things_on_different_places(seed):
    scene = sample_scene(random.Random(seed))
    places = [thing.place for thing in scene.things]
    assert 1 <= len(places) <= 4
    assert len(set(places)) == len(places)
    assert places == sorted(places)
    assert set(places) <= set(range(len(PLACES)))


@steady
@given(SEEDS, SEEDS, st.sampled_from(SPLITS), st.sampled_from(SPLITS))
def test_splits_are_disjoint_by_key_whatever_the_seeds(seed, other_seed, split, other_split):
    rng, other = random.Random(seed), random.Random(other_seed)
    keys = {sample_scene(rng, split).key for _ in range(3)}
    other_keys = {sample_scene(other, other_split).key for _ in range(3)}
    assert split == other_split or not keys & other_keys


@steady
@given(scenes(), st.randoms(use_true_random=False))
def test_a_split_depends_on_the_content_alone(scene, rng):
    things = list(scene.things)
    rng.shuffle(things)
    again = make_scene(*things, background=scene.background)
    assert again == scene
    assert again.split == scene.split


@steady
@given(scenes(), scenes())
def test_keys_are_equal_exactly_when_scenes_are(one, other):
    assert (one.key == other.key) == (one == other)


@steady
@given(SEEDS, st.sampled_from(SPLITS))
def test_a_scene_asked_for_in_a_split_lies_in_it(seed, split):
    assert sample_scene(random.Random(seed), split).split == split


def test_splits_have_their_shares():
    rng = random.Random(0)
    found = Counter(sample_scene(rng).split for _ in range(4000))
    assert set(found) == set(SPLITS)
    for split, percent in SPLIT_SHARES.items():
        assert found[split] / 40 == pytest.approx(percent, abs=2.5)


def differences(one: Scene, other: Scene) -> int:
    """Attributes in which two scenes with as many things differ, counted."""
    attributes = [f.name for f in fields(Thing)]
    changed = sum(
        getattr(a, name) != getattr(b, name)
        for a, b in zip(one.things, other.things, strict=True)
        for name in attributes
    )
    return changed + (one.background != other.background)


@steady
@given(scenes())
def test_near_misses_differ_in_exactly_one_attribute(scene):
    assert {differences(scene, near) for near in near_misses(scene)} == {1}


@steady
@given(scenes())
def test_near_misses_leave_everything_where_it_is(scene):
    places = [thing.place for thing in scene.things]
    assert all([t.place for t in near.things] == places for near in near_misses(scene))


@steady
@given(scenes())
def test_near_misses_are_complete_and_each_is_there_once(scene):
    near = near_misses(scene)
    per_thing = sum(len(values) - 1 for values in (SHAPES, COLOURS, SIZES, FILLS))
    assert len(near) == len(set(near)) == len(BACKGROUNDS) - 1 + per_thing * len(scene.things)


@steady
@given(scenes(), st.sampled_from(SPLITS))
def test_near_misses_of_a_split_are_those_in_it(scene, split):
    assert near_misses(scene, split) == [s for s in near_misses(scene) if s.split == split]


ANYTHING = r"(?P<size>\w+) (?P<fill>\w+) (?P<colour>\w+) (?P<shape>\w+)"
NAMED = r"(?P<colour>\w+) (?P<shape>\w+)(?: at the (?P<place>[\w ]+?))?"


def follow(instruction: str, source: Scene) -> Scene:
    """Read an instruction as a person would, and do to `source` what it says."""

    def read(pattern: str) -> dict[str, str] | None:
        found = re.fullmatch(pattern, instruction)
        return found and found.groupdict()

    def the(names: dict[str, str]) -> Thing:
        named = [
            t
            for t in source.things
            if (t.colour, t.shape) == (names["colour"], names["shape"])
            and names["place"] in (None, PLACES[t.place])
        ]
        (thing,) = named  # what an instruction names is there, once
        return thing

    def instead(old: Thing, *new: Thing) -> Scene:
        rest = [t for t in source.things if t != old]
        return make_scene(*rest, *new, background=source.background)

    if said := read(r"make the background (?P<background>\w+)"):
        return replace(source, background=said["background"])
    if said := read(rf"add an? {ANYTHING} at the (?P<place>[\w ]+)"):
        place = PLACES.index(said.pop("place"))
        return make_scene(*source.things, Thing(place, **said), background=source.background)
    if said := read(rf"remove the {NAMED}"):
        return instead(the(said))
    if said := read(rf"move the {NAMED} to the (?P<to>[\w ]+)"):
        thing = the(said)
        return instead(thing, replace(thing, place=PLACES.index(said["to"])))
    if said := read(rf"replace the {NAMED} by an? (?P<new_colour>\w+) (?P<new_shape>\w+)"):
        thing = the(said)
        return instead(thing, replace(thing, colour=said["new_colour"], shape=said["new_shape"]))
    if said := read(rf"make the {NAMED} (?P<new_colour>{'|'.join(COLOURS)})"):
        thing = the(said)
        return instead(thing, replace(thing, colour=said["new_colour"]))
    raise AssertionError(f"not understood: {instruction}")


def edited(rng: random.Random, source: Scene, kind: str) -> Edit:
    return sample_edit(rng, source, kind=kind)


@pytest.mark.parametrize("kind", EDIT_KINDS)
@steady
@given(scenes(), SEEDS)
def test_an_edit_does_what_its_instruction_says(kind, source, seed):
    edit = edited(random.Random(seed), source, kind)
    assert edit.target == follow(edit_instruction(edit), source)
    assert edit.target != source


TWINS = make_scene(
    Thing(0, "star", "red", "small", "solid"),
    Thing(4, "star", "red", "large", "solid"),
    Thing(8, "star", "red", "small", "solid"),
    background="navy",
)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_says_which_of_several_alike_it_means(kind):
    rng = random.Random(0)
    for _ in range(30):
        edit = edited(rng, TWINS, kind)
        assert edit.kind == kind
        assert edit.target == follow(edit_instruction(edit), TWINS)


def test_all_six_kinds_come_up():
    rng = random.Random(0)
    assert {sample_edit(rng, TWINS).kind for _ in range(100)} == set(EDIT_KINDS)


def test_what_a_scene_does_not_allow_falls_back_to_another_edit():
    rng = random.Random(0)
    alone = sample_scene(rng)
    alone = make_scene(alone.things[0], background=alone.background)
    full = make_scene(
        *(Thing(i, "moon", "pink", "small", "solid") for i in range(4)), background="teal"
    )
    for _ in range(30):
        assert sample_edit(rng, alone, kind="remove").kind != "remove"
        assert sample_edit(rng, full, kind="add").kind != "add"


@steady
@given(SEEDS, st.sampled_from(SPLITS))
def test_an_edit_leads_to_a_scene_of_the_split_asked_for(seed, split):
    rng = random.Random(seed)
    assert sample_edit(rng, sample_scene(rng), split).target.split == split


class Impatient(random.Random):
    """Gives up after more draws than any edit needs, where a plain one would go on forever."""

    left = 50_000

    def choice(self, seq):
        self.left -= 1
        assert self.left, "drawing without end"
        return super().choice(seq)


def test_an_edit_whose_kind_cannot_reach_the_split_falls_back_to_another_one():
    rng = Impatient(0)
    pair = next(
        scene
        for scene in iter(lambda: sample_scene(rng), None)
        if len(scene.things) == 2
        and all(
            make_scene(thing, background=scene.background).split != "test" for thing in scene.things
        )
    )
    assert sample_edit(rng, pair, "test", "remove").target.split == "test"


def test_an_unknown_split_is_an_error():
    rng = Impatient(0)
    rng.left = 2_000
    with pytest.raises(ValueError, match="tset"):
        sample_scene(rng, "tset")
