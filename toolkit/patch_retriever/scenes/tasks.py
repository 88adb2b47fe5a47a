"""Retrieval tasks over scenes, in all eight directions, with near misses and exact relevance."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from patch_retriever.files import value_hash
from patch_retriever.items import Item
from patch_retriever.retrieval.collection import Collection, Task
from patch_retriever.scenes.language import Caption, caption, edit_instruction
from patch_retriever.scenes.render import render
from patch_retriever.scenes.world import (
    Scene,
    near_misses,
    sample_edit,
    sample_scene,
)


@dataclass(frozen=True)
class ScenePicture:
    """One view of a scene, drawn when it is opened."""

    scene: Scene
    view: int = 0

    @property
    def name(self) -> str:
        """The scene's key and the view."""
        return f"{self.scene.key}#{self.view}"

    def open(self) -> Image.Image:
        """The rendered picture."""
        return render(self.scene, self.view)

    def content_hash(self) -> str:
        """Of the scene and the view: they say every pixel."""
        return value_hash(self.name)


class Relevance:
    """Which scenes of a gallery a caption is true of (or equal a scene), by an inverted index."""

    def __init__(self, gallery: Sequence[Scene]) -> None:
        self.gallery = gallery
        self.with_object: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.positions: dict[Scene, list[int]] = defaultdict(list)
        for position, scene in enumerate(gallery):
            self.positions[scene].append(position)
            for thing in scene.things:
                self.with_object[thing.shape, thing.colour].add(position)

    def of_caption(self, said: Caption) -> tuple[int, ...]:
        """Positions of all scenes that `said` fits."""
        candidates: Iterable[int] = range(len(self.gallery))
        if said.mentions:
            found = [self.with_object[m.shape, m.colour] for m in said.mentions]
            candidates = set.intersection(*found)
        return tuple(sorted(p for p in candidates if said.fits(self.gallery[p])))

    def of_scene(self, scene: Scene) -> tuple[int, ...]:
        """Positions of `scene` itself."""
        return tuple(self.positions[scene])


def scenes_collection(split: str, n: int, seed: int) -> Collection:
    """Ten tasks over `n` random scenes of `split`: t->i three times, the other directions once.

    The gallery of every task holds 3 n scenes: the n that are asked about, for each a near miss
    that differs in one attribute, and the result of an edit. Queries are

    - t->i full, short, web: a caption in that style; t->t: a paraphrase, among full captions;
      t->it: colours, shapes and places, among pictures with a web title;
    - i->t: a picture, among full captions; i->i: another view of the scene;
    - it->t, it->i, it->it: a picture and an edit, among captions, pictures, titled pictures.
    """
    rng = random.Random(f"{split}/{seed}/{n}")
    near: dict[Scene, Scene] = {}  # each scene that is asked about, with its near miss
    while len(near) < n:
        scene = sample_scene(rng, split)
        if options := near_misses(scene, split):  # few-object scenes may have none in their split
            near[scene] = rng.choice(options)
    asked = list(near)
    edits = [sample_edit(rng, scene, split) for scene in asked]
    gallery = [*asked, *near.values(), *(edit.target for edit in edits)]
    relevance = Relevance(gallery)

    items: list[Item] = []

    def add(new: Iterable[Item]) -> tuple[int, ...]:
        start = len(items)
        items.extend(new)
        return tuple(range(start, len(items)))

    pictures = add(Item(picture=ScenePicture(scene)) for scene in gallery)
    texts = add(Item(caption(rng, scene, "full").text) for scene in gallery)
    titled = add(
        Item(caption(rng, scene, "web").text, ScenePicture(scene, view=2)) for scene in gallery
    )
    other_views = add(Item(picture=ScenePicture(scene, view=1)) for scene in asked)
    composed = add(
        Item(edit_instruction(edit), ScenePicture(edit.source, view=3)) for edit in edits
    )
    said = {
        style: [caption(rng, scene, style) for scene in asked]
        for style in ("paraphrase", "plain", "short", "web")
    }
    asking = {style: add(Item(c.text) for c in said[style]) for style in said}
    fits = {style: tuple(map(relevance.of_caption, said[style])) for style in said}
    itself = tuple(map(relevance.of_scene, asked))
    result = tuple(relevance.of_scene(edit.target) for edit in edits)

    tasks = (
        Task("t->i full", "t->i", texts[:n], pictures, itself),
        Task("t->i short", "t->i", asking["short"], pictures, fits["short"]),
        Task("t->i web", "t->i", asking["web"], pictures, fits["web"]),
        Task("t->t", "t->t", asking["paraphrase"], texts, fits["paraphrase"]),
        Task("t->it", "t->it", asking["plain"], titled, fits["plain"]),
        Task("i->t", "i->t", pictures[:n], texts, itself),
        Task("i->i", "i->i", other_views, pictures, itself),
        Task("it->t", "it->t", composed, texts, result),
        Task("it->i", "it->i", composed, pictures, result),
        Task("it->it", "it->it", composed, titled, result),
    )
    return Collection(split, tuple(items), tasks)
