"""What can be said about scenes: captions in many styles, questions with answers, edits, sentences.

A caption keeps what it claims (`Mention`s, background, count) beside its words, so that
`Caption.fits` decides exactly which scenes it is true of.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from patch_retriever.scenes.world import PLACES, SHAPES, Edit, Scene, Thing

CAPTION_STYLES = ("full", "paraphrase", "plain", "short", "terse", "chatty", "web", "count")
COMPLETE_STYLES = ("full", "paraphrase")
"""Styles that say everything about a scene: such a caption fits one scene only."""

_SYNONYMS = {
    "circle": "disc",
    "square": "box",
    "cross": "plus sign",
    "moon": "crescent",
    "diamond": "rhombus",
    "small": "little",
    "large": "big",
    "solid": "filled",
    "outlined": "hollow",
    "striped": "stripy",
    "purple": "violet",
    "red": "crimson",
    "top": "upper middle",
    "bottom": "lower middle",
    "top left": "upper left corner",
    "top right": "upper right corner",
    "bottom left": "lower left corner",
    "bottom right": "lower right corner",
    "centre": "middle",
    "left": "left edge",
    "right": "right edge",
    "background": "backdrop",
}
_NUMBERS = ("zero", "one", "two", "three", "four")
_WEB = (
    "{things} wall art print | free shipping on orders over 50",
    "stock photo {number}: {things}, royalty free download",
    "img_{number}.jpg {things} - click to enlarge",
    "buy {things} stickers online, best price, 4.8 stars",
    "{things} clipart (vector, png) - page {number} of 9000",
)
_CHATTY = (
    "so there is {things} here, nice one",
    "look, i can see {things} in this picture",
    "hey, someone put {things} together",
    "well, this one has {things} and that is it",
)


@dataclass(frozen=True)
class Mention:
    """One object as a caption mentions it; what is `None` is left open."""

    shape: str
    colour: str
    size: str | None = None
    fill: str | None = None
    place: int | None = None

    def matches(self, thing: Thing) -> bool:
        """Whether `thing` is as mentioned."""
        return (
            self.shape == thing.shape
            and self.colour == thing.colour
            and self.size in (None, thing.size)
            and self.fill in (None, thing.fill)
            and self.place in (None, thing.place)
        )


@dataclass(frozen=True)
class Caption:
    """A text about a scene with what it claims: mentioned objects, background and count."""

    text: str
    style: str
    mentions: tuple[Mention, ...]
    background: str | None = None
    count: int | None = None

    def fits(self, scene: Scene) -> bool:
        """Whether every claim is true of `scene` (mentions of distinct objects)."""
        if self.background not in (None, scene.background):
            return False
        if self.count not in (None, len(scene.things)):
            return False
        return any(
            all(m.matches(t) for m, t in zip(self.mentions, things, strict=True))
            for things in permutations(scene.things, len(self.mentions))
        )


def article(words: str) -> str:
    """`words` with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(rng: random.Random, scene: Scene, style: str) -> Caption:
    """A caption of `scene` in one of `CAPTION_STYLES`.

    full, paraphrase   every attribute of every object and the background; the paraphrase uses
                       synonyms and any order
    plain              colour, shape and place of every object
    short, terse       colour and shape of one or two objects
    chatty, web        the same inside chat or web boilerplate
    count              how many objects on which background
    """
    if style == "count":
        n = len(scene.things)
        text = f"{_NUMBERS[n]} {'shape' if n == 1 else 'shapes'} on {article(scene.background)}"
        return Caption(f"{text} background", style, (), scene.background, n)
    things = list(scene.things)
    if style in COMPLETE_STYLES:
        if style == "paraphrase":
            rng.shuffle(things)
        synonyms = _SYNONYMS if style == "paraphrase" else {}

        def say(*words: str) -> str:
            return " ".join(synonyms.get(word, word) for word in words)

        phrases = [
            f"{article(say(t.size, t.fill, t.colour, t.shape))} at the {say(PLACES[t.place])}"
            for t in things
        ]
        text = f"{join(phrases)}, on {article(scene.background)} {say('background')}"
        mentions = tuple(Mention(t.shape, t.colour, t.size, t.fill, t.place) for t in things)
        return Caption(text, style, mentions, scene.background, len(things))
    if style == "plain":
        phrases = [f"{article(t.colour)} {t.shape} at the {PLACES[t.place]}" for t in things]
        mentions = tuple(Mention(t.shape, t.colour, place=t.place) for t in things)
        return Caption(join(phrases), style, mentions, count=len(things))
    some = rng.sample(things, min(len(things), rng.choice((1, 2, 2))))
    mentions = tuple(Mention(t.shape, t.colour) for t in some)
    names = [f"{t.colour} {t.shape}" for t in some]
    match style:
        case "short":
            text = join([article(name) for name in names])
        case "terse":
            text = ", ".join(names)
        case "chatty":
            text = rng.choice(_CHATTY).format(things=join([article(name) for name in names]))
        case "web":
            text = rng.choice(_WEB).format(
                things=" and ".join(names), number=rng.randrange(1000, 9000)
            )
        case _:
            raise ValueError(f"unknown caption style {style!r}: one of {', '.join(CAPTION_STYLES)}")
    return Caption(text, style, mentions)


def join(phrases: Sequence[str]) -> str:
    """Phrases as one enumeration: "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def edit_instruction(edit: Edit) -> str:
    """The edit as a request to someone who sees the source."""
    name = _name_in(edit.source, edit.before)
    match edit.kind, edit.after:
        case "background", _:
            return f"make the background {edit.target.background}"
        case "add", Thing() as after:
            what = article(f"{after.size} {after.fill} {after.colour} {after.shape}")
            return f"add {what} at the {PLACES[after.place]}"
        case "remove", _:
            return f"remove the {name}"
        case "move", Thing() as after:
            return f"move the {name} to the {PLACES[after.place]}"
        case "recolour", Thing() as after:
            return f"make the {name} {after.colour}"
        case "replace", Thing() as after:
            return f"replace the {name} by {article(after.colour)} {after.shape}"
    raise ValueError(f"unknown edit kind {edit.kind!r}")


def _name_in(scene: Scene, thing: Thing | None) -> str:
    """A name for `thing` that is unique in `scene` (with its place only where it has to be)."""
    if thing is None:
        return ""
    twins = [t for t in scene.things if (t.shape, t.colour) == (thing.shape, thing.colour)]
    where = "" if len(twins) == 1 else f" at the {PLACES[thing.place]}"
    return f"{thing.colour} {thing.shape}{where}"


QUESTION_KINDS = ("shape", "colour", "fill", "size", "place", "count", "background", "yes/no")


def question(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str]:
    """A question of one of `QUESTION_KINDS` about `scene` with its short true answer."""
    thing = rng.choice(scene.things)
    place = PLACES[thing.place]
    name = _name_in(scene, thing)
    match kind:
        case "shape":
            return f"what shape is at the {place}?", thing.shape
        case "colour":
            if sum(t.shape == thing.shape for t in scene.things) == 1 and rng.random() < 0.5:
                return f"what colour is the {thing.shape}?", thing.colour
            return f"what colour is the shape at the {place}?", thing.colour
        case "fill":
            return f"is the {name} solid, outlined or striped?", thing.fill
        case "size":
            return f"is the {name} small or large?", thing.size
        case "place" if "at the" not in name:
            return f"where is the {name}?", place
        case "place" | "count":
            return "how many shapes are there?", _NUMBERS[len(scene.things)]
        case "background":
            return "what colour is the background?", scene.background
        case "yes/no":
            if rng.random() < 0.5:
                return f"is there {article(thing.colour)} {thing.shape}?", "yes"
            shape = rng.choice(SHAPES)
            there = any((t.colour, t.shape) == (thing.colour, shape) for t in scene.things)
            return f"is there {article(thing.colour)} {shape}?", "yes" if there else "no"
    raise ValueError(f"unknown question kind {kind!r}: one of {', '.join(QUESTION_KINDS)}")


def one_word(rng: random.Random, scene: Scene) -> str:
    """One true word about `scene`: a colour or shape of an object, a fill, or the background."""
    thing = rng.choice(scene.things)
    return rng.choice(
        (thing.colour, thing.colour, thing.shape, thing.shape, thing.fill, scene.background)
    )


def sentence(rng: random.Random, scene: Scene) -> str:
    """A text-only sentence that says something true of `scene` in passing."""
    thing = rng.choice(scene.things)
    name = f"{thing.colour} {thing.shape}"
    return rng.choice(
        (
            f"my sister drew {article(name)} and hung it on a {scene.background} wall",
            f"they asked for {article(name)}, {thing.fill} if possible",
            f"the {thing.size} {name} is the one that everybody likes",
            f"on monday we counted {_NUMBERS[len(scene.things)]} shapes, one of them {thing.fill}",
            f"a {thing.size} {thing.shape} is easier to paint than it looks",
        )
    )
