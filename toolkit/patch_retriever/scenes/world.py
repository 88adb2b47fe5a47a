"""Scenes: what there is to see, before anything is drawn or said.

A scene is one to four objects on a 3x3 grid in front of a background. Everything else in the
built-in world (pictures, captions, tasks) is a function of scenes, so that relevance can be
decided exactly instead of judged.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "white")
SIZES = ("small", "large")
FILLS = ("solid", "outlined", "striped")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUNDS = ("black", "grey", "brown", "navy", "olive", "teal")
EDIT_KINDS = ("replace", "recolour", "remove", "add", "background", "move")

SPLIT_SHARES = {"train": 70, "calibration": 10, "validation": 10, "test": 10}
"""Percent of all possible scenes in each split; `Scene.split` hashes the scene's content."""


@dataclass(frozen=True, order=True)
class Thing:
    """One object: what it is and where it stands (`place` indexes `PLACES`)."""

    place: int
    shape: str
    colour: str
    size: str
    fill: str


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (row by row) in front of a background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def key(self) -> str:
        """The scene's content as one string: equal scenes have equal keys."""
        things = ";".join(f"{t.place},{t.shape},{t.colour},{t.size},{t.fill}" for t in self.things)
        return f"{self.background}|{things}"

    @property
    def split(self) -> str:
        """The split this scene belongs to, whoever draws it and from whatever seed.

        The split is a hash of the content, so a scene can never be in two splits.
        """
        percent = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") % 100
        for split, share in SPLIT_SHARES.items():
            if percent < share:
                return split
            percent -= share
        raise AssertionError("SPLIT_SHARES add up to 100")


@dataclass(frozen=True)
class Edit:
    """A change of one scene into another: `kind` in `EDIT_KINDS`, and the things it is about."""

    kind: str
    source: Scene
    target: Scene
    before: Thing | None = None
    after: Thing | None = None


def make_scene(*things: Thing, background: str) -> Scene:
    """A scene from things in any order (they are kept in reading order)."""
    return Scene(tuple(sorted(things)), background)


def sample_thing(rng: random.Random, place: int) -> Thing:
    """A random thing at `place`."""
    return Thing(
        place, rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES), rng.choice(FILLS)
    )


def sample_scene(rng: random.Random, split: str | None = None) -> Scene:
    """A random scene, of `split` if one is named.

    More objects are likelier than few: there are few scenes with one object.
    """
    if split not in (None, *SPLIT_SHARES):
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLIT_SHARES)}")
    while True:
        count = rng.choices((1, 2, 3, 4), (1, 2, 3, 3))[0]
        places = rng.sample(range(len(PLACES)), count)
        scene = make_scene(
            *(sample_thing(rng, place) for place in places), background=rng.choice(BACKGROUNDS)
        )
        if split is None or scene.split == split:
            return scene


def sample_edit(
    rng: random.Random, source: Scene, split: str | None = None, kind: str | None = None
) -> Edit:
    """A random edit of `source` whose result differs from it and lies in `split`.

    `kind` asks for one of `EDIT_KINDS`; a kind that the scene does not allow (removing its
    only object, adding a fifth) falls back to the others.
    """
    for tries in itertools.count():
        if tries == 100:  # perhaps no edit of this kind leads into `split`
            kind = None
        edit = _draw_edit(rng, source, kind or rng.choice(EDIT_KINDS))
        if edit is None:
            kind = None
        elif edit.target != source and (split is None or edit.target.split == split):
            return edit
    raise AssertionError("some edit leads into every split")


def _draw_edit(rng: random.Random, source: Scene, kind: str) -> Edit | None:
    thing = rng.choice(source.things)
    free = sorted(set(range(len(PLACES))) - {t.place for t in source.things})
    match kind:
        case "replace":
            after = replace(thing, shape=rng.choice(SHAPES), colour=rng.choice(COLOURS))
        case "recolour":
            after = replace(thing, colour=rng.choice(COLOURS))
        case "move":
            after = replace(thing, place=rng.choice(free))
        case "add" if len(source.things) < 4:
            after = sample_thing(rng, rng.choice(free))
            target = make_scene(*source.things, after, background=source.background)
            return Edit(kind, source, target, after=after)
        case "remove" if len(source.things) > 1:
            rest = [t for t in source.things if t != thing]
            return Edit(kind, source, make_scene(*rest, background=source.background), thing)
        case "background":
            return Edit(kind, source, Scene(source.things, rng.choice(BACKGROUNDS)))
        case _:
            return None
    rest = [t for t in source.things if t != thing]
    return Edit(kind, source, make_scene(*rest, after, background=source.background), thing, after)


def near_misses(scene: Scene, split: str | None = None) -> list[Scene]:
    """Every scene (of `split`) that differs from `scene` in one attribute of one object or in the
    background."""
    options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "fill": FILLS}
    near = [replace(scene, background=background) for background in BACKGROUNDS]
    for i, thing in enumerate(scene.things):
        for attribute, values in options.items():
            for value in values:
                changed = replace(thing, **{attribute: value})  # type: ignore[arg-type]
                near.append(
                    replace(scene, things=(*scene.things[:i], changed, *scene.things[i + 1 :]))
                )
    return [s for s in near if s != scene and split in (None, s.split)]
