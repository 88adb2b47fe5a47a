"""What is said about scenes: captions mean what they say, questions have true answers."""

from __future__ import annotations

import random
import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.scenes.language import (
    CAPTION_STYLES,
    COMPLETE_STYLES,
    QUESTION_KINDS,
    Caption,
    Mention,
    article,
    caption,
    join,
    one_word,
    question,
    sentence,
)
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
    sample_scene,
)

SEEDS = st.integers(0, 2**32)
steady = settings(deadline=None, derandomize=True)
NUMBERS = ("zero", "one", "two", "three", "four")
MEANING = {
    "disc": "circle",
    "box": "square",
    "plus sign": "cross",
    "crescent": "moon",
    "rhombus": "diamond",
    "little": "small",
    "big": "large",
    "filled": "solid",
    "hollow": "outlined",
    "stripy": "striped",
    "violet": "purple",
    "crimson": "red",
    "upper middle": "top",
    "lower middle": "bottom",
    "upper left corner": "top left",
    "upper right corner": "top right",
    "lower left corner": "bottom left",
    "lower right corner": "bottom right",
    "middle": "centre",
    "left edge": "left",
    "right edge": "right",
    "backdrop": "background",
}


@st.composite
def crowded_scenes(draw: st.DrawFn) -> Scene:
    """Scenes of few shapes and colours, so that one mention fits several things."""
    places = draw(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))
    choices = (SHAPES[:2], COLOURS[:2], SIZES, FILLS[:2])
    things = [
        Thing(place, *(draw(st.sampled_from(values)) for values in choices)) for place in places
    ]
    return make_scene(*things, background=draw(st.sampled_from(BACKGROUNDS[:2])))


def one_of(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


def plainly(text: str) -> str:
    """`text` with its synonyms replaced by the plain words."""
    return re.sub(rf"\b({one_of(MEANING)})\b", lambda found: MEANING[found[0]], text)


THING = re.compile(
    rf"(?:(?P<size>{one_of(SIZES)}) (?P<fill>{one_of(FILLS)}) )?"
    rf"\b(?P<colour>{one_of(COLOURS)}) (?P<shape>{one_of(SHAPES)})\b"
    rf"(?: at the (?P<place>{one_of(PLACES)}))?"
)


def true_of(said: Caption, scene: Scene) -> bool:
    """Whether the caption's words, read on their own, are true of `scene`."""
    text = plainly(said.text)
    behind = re.search(rf"on an? ({one_of(BACKGROUNDS)}) background", text)
    if behind and behind[1] != scene.background:
        return False
    claims = [
        {k: v for k, v in found.groupdict().items() if v is not None}
        for found in THING.finditer(text)
    ]
    counted = re.match(rf"({one_of(NUMBERS)}) shapes? on", text)
    if counted and NUMBERS.index(counted[1]) != len(scene.things):
        return False
    # a caption that places its things says all that is there
    if claims and "place" in claims[0] and len(claims) != len(scene.things):
        return False
    there = [
        {
            "size": t.size,
            "fill": t.fill,
            "colour": t.colour,
            "shape": t.shape,
            "place": PLACES[t.place],
        }
        for t in scene.things
    ]
    return any(
        len(set(order)) == len(order)
        and all(claim.items() <= there[i].items() for claim, i in zip(claims, order, strict=True))
        for order in product(range(len(there)), repeat=len(claims))
    )


@pytest.mark.parametrize("style", CAPTION_STYLES)
@steady
@given(scene=crowded_scenes(), other=crowded_scenes(), seed=SEEDS)
def test_a_caption_fits_exactly_the_scenes_that_its_words_are_true_of(style, scene, other, seed):
    said = caption(random.Random(seed), scene, style)
    rng = random.Random(seed)
    for candidate in (scene, other, *rng.sample(near_misses(scene), 5)):
        assert said.fits(candidate) == true_of(said, candidate), (said.text, candidate)


@pytest.mark.parametrize("style", CAPTION_STYLES)
@steady
@given(SEEDS)
def test_a_caption_fits_its_own_scene(style, seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    said = caption(rng, scene, style)
    assert said.style == style
    assert said.fits(scene)
    assert true_of(said, scene)


@pytest.mark.parametrize("style", COMPLETE_STYLES)
@steady
@given(SEEDS)
def test_a_complete_caption_fits_no_near_miss(style, seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    said = caption(rng, scene, style)
    assert not any(said.fits(near) for near in near_misses(scene))


@steady
@given(SEEDS)
def test_a_paraphrase_says_the_same_in_other_words(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    full, other = (caption(rng, scene, style) for style in COMPLETE_STYLES)
    assert other.text != full.text
    assert sorted(THING.findall(plainly(other.text))) == sorted(THING.findall(full.text))


RED_STAR = Thing(0, "star", "red", "small", "solid")


def test_two_mentions_need_two_things():
    said = Caption("two red stars", "short", (Mention("star", "red"), Mention("star", "red")))
    twin = Thing(1, "star", "red", "large", "solid")
    assert said.fits(make_scene(RED_STAR, twin, background="grey"))
    assert not said.fits(make_scene(RED_STAR, background="grey"))


def test_a_vague_mention_leaves_the_thing_that_a_precise_one_needs():
    said = Caption("", "short", (Mention("star", "red"), Mention("star", "red", size="small")))
    twin = Thing(1, "star", "red", "large", "solid")
    assert said.fits(make_scene(RED_STAR, twin, background="grey"))


@pytest.mark.parametrize("style", CAPTION_STYLES)
@steady
@given(SEEDS)
def test_a_seed_always_gives_the_same_caption(style, seed):
    scene = sample_scene(random.Random(seed))
    one, other = (caption(random.Random(seed), scene, style) for _ in range(2))
    assert one == other


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match=r"'sonnet'.*paraphrase"):
        caption(random.Random(0), sample_scene(random.Random(0)), "sonnet")


@pytest.mark.parametrize(
    ("phrases", "joined"),
    [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_enumerations(phrases, joined):
    assert join(phrases) == joined


@pytest.mark.parametrize(("words", "said"), [("red star", "a red star"), ("olive", "an olive")])
def test_articles(words, said):
    assert article(words) == said


def answers(asked: str, scene: Scene) -> set[str]:
    """Every true answer to a question, by looking."""

    def look(pattern: str) -> list[Thing] | None:
        if not (found := re.fullmatch(pattern, asked)):
            return None
        names = found.groupdict()
        if "place" in names and names["place"] is not None:
            names["place"] = PLACES.index(names["place"])
        return [
            t
            for t in scene.things
            if all(getattr(t, k) == v for k, v in names.items() if v is not None)
        ]

    colour, shape = rf"(?P<colour>{one_of(COLOURS)})", rf"(?P<shape>{one_of(SHAPES)})"
    place = rf"at the (?P<place>{one_of(PLACES)})"
    name = f"{colour} {shape}(?: {place})?"
    if (things := look(f"what shape is {place}\\?")) is not None:
        return {t.shape for t in things}
    if (things := look(f"what colour is the {shape}\\?")) is not None:
        return {t.colour for t in things}
    if (things := look(f"what colour is the shape {place}\\?")) is not None:
        return {t.colour for t in things}
    if (things := look(f"is the {name} solid, outlined or striped\\?")) is not None:
        return {t.fill for t in things}
    if (things := look(f"is the {name} small or large\\?")) is not None:
        return {t.size for t in things}
    if (things := look(f"where is the {name}\\?")) is not None:
        return {PLACES[t.place] for t in things}
    if (things := look(f"is there an? {colour} {shape}\\?")) is not None:
        return {"yes" if things else "no"}
    return {
        "how many shapes are there?": {NUMBERS[len(scene.things)]},
        "what colour is the background?": {scene.background},
    }[asked]


@pytest.mark.parametrize("kind", QUESTION_KINDS)
@steady
@given(scene=crowded_scenes(), seed=SEEDS)
def test_a_question_has_one_true_answer_and_it_is_given(kind, scene, seed):
    asked, answer = question(random.Random(seed), scene, kind)
    assert answers(asked, scene) == {answer}


def test_yes_and_no_both_come_up():
    rng = random.Random(0)
    scene = sample_scene(rng)
    assert {question(rng, scene, "yes/no")[1] for _ in range(50)} == {"yes", "no"}


def test_an_unknown_kind_of_question_is_named():
    with pytest.raises(ValueError, match=r"'why'.*yes/no"):
        question(random.Random(0), sample_scene(random.Random(0)), "why")


@steady
@given(SEEDS)
def test_one_word_is_true_of_the_scene(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    true = {scene.background, *(w for t in scene.things for w in (t.colour, t.shape, t.fill))}
    assert one_word(rng, scene) in true


@steady
@given(SEEDS)
def test_a_sentence_speaks_of_one_thing_that_is_there(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    words = set(re.findall(r"\w+", sentence(rng, scene)))

    def said_of(thing: Thing) -> bool:
        properties = {
            *(set(SHAPES) - {thing.shape}),
            *(set(COLOURS) - {thing.colour}),
            *(set(SIZES) - {thing.size}),
            *(set(FILLS) - {thing.fill}),
        }
        return not words & properties

    assert any(map(said_of, scene.things))
