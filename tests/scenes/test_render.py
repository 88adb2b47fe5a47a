"""Rendering: a function of scene and view, and what the scene says is where it says."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.scenes.render import IMAGE_SIZE, RGB, render
from patch_retriever.scenes.tasks import ScenePicture
from patch_retriever.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    make_scene,
    sample_scene,
)

SEEDS = st.integers(0, 2**32)
few = settings(deadline=None, derandomize=True, max_examples=30)
CELL = IMAGE_SIZE // 3


def pixels(scene: Scene, view: int = 0) -> np.ndarray:
    return np.asarray(render(scene, view), dtype=np.float32)


def cell(picture: np.ndarray, place: int, margin: int = 0) -> np.ndarray:
    row, column = divmod(place, 3)
    inside = [slice(i * CELL + margin, (i + 1) * CELL - margin) for i in (row, column)]
    return picture[inside[0], inside[1]]


def drawn(shape="square", colour="red", size="large", fill="solid", place=4, background="grey"):
    return make_scene(Thing(place, shape, colour, size, fill), background=background)


@few
@given(SEEDS, st.integers(0, 1000))
def test_same_scene_and_view_same_pixels(seed, view):
    scene = sample_scene(random.Random(seed))
    again = make_scene(*reversed(scene.things), background=scene.background)
    assert render(scene, view).tobytes() == render(again, view).tobytes()


@few
@given(SEEDS, st.integers(0, 1000), st.integers(0, 1000))
def test_other_view_other_pixels(seed, view, other_view):
    scene = sample_scene(random.Random(seed))
    same = render(scene, view).tobytes() == render(scene, other_view).tobytes()
    assert same == (view == other_view)


@few
@given(SEEDS)
def test_pictures_are_rgb_of_72_pixels(seed):
    picture = render(sample_scene(random.Random(seed)))
    assert (picture.mode, picture.size) == ("RGB", (72, 72))


def test_the_view_without_a_number_is_the_first():
    scene = sample_scene(random.Random(0))
    assert render(scene).tobytes() == render(scene, 0).tobytes()


def test_a_scene_picture_opens_as_its_view():
    scene = sample_scene(random.Random(1))
    for view in (0, 3):
        picture = ScenePicture(scene, view)
        assert picture.open().tobytes() == render(scene, view).tobytes()
        assert picture.name == f"{scene.key}#{view}"


def near(found_c: np.ndarray, name: str) -> bool:
    """Within what light and noise can do to the colour `name`."""
    wanted_c = np.array(RGB[name], dtype=np.float32)
    return bool((np.abs(found_c - wanted_c) <= 0.25 * wanted_c + 6).all())


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_has_its_colour_at_its_place(colour):
    for place in range(9):
        picture = pixels(drawn(colour=colour, place=place))
        assert near(np.median(cell(picture, place, margin=8), axis=(0, 1)), colour)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_empty_places_show_the_background(background):
    picture = pixels(drawn(place=4, background=background))
    for place in (0, 2, 6, 8):
        assert near(cell(picture, place).mean((0, 1)), background)


def test_colours_and_backgrounds_can_be_told_apart():
    for one, other in combinations(RGB, 2):
        difference = np.abs(np.subtract(RGB[one], RGB[other], dtype=np.float32)).max()
        assert difference > 25, (one, other)


def average(views: int = 12, **attributes: str) -> np.ndarray:
    """The mean of several views, in which noise and jitter are small."""
    scene = drawn(**attributes)
    return cell(np.mean([pixels(scene, view) for view in range(views)], axis=0), 4)


@pytest.mark.parametrize(("attribute", "values"), [("shape", SHAPES), ("fill", FILLS)])
def test_every_shape_and_fill_is_drawn_differently(attribute, values):
    averages = {value: average(colour="white", **{attribute: value}) for value in values}
    for one, other in combinations(values, 2):
        difference = np.abs(averages[one] - averages[other]).mean()
        assert difference > 6, (one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_large_covers_more_than_small(shape):
    covered = [
        (average(views=4, shape=shape, colour="white", size=size) > 185).sum() for size in SIZES
    ]
    assert covered[0] * 1.3 < covered[1]


@few
@given(SEEDS)
def test_every_thing_of_a_scene_is_drawn(seed):
    scene = sample_scene(random.Random(seed))
    picture = pixels(scene)
    taken = {thing.place for thing in scene.things}
    empty = np.concatenate([cell(picture, p, 4).reshape(-1, 3) for p in range(9) if p not in taken])
    for thing in scene.things:
        there = cell(picture, thing.place, 4).reshape(-1, 3)
        far = np.abs(there - empty.mean(0)).max(1) > 3 * 12
        assert far.mean() > 0.05
