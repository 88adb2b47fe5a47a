"""What the MLLM is taught: batches of conversations about drawn scenes, any of them at any time.

Scenes are drawn as they are needed, and what comes at a step depends on the seed and the step
alone, so that a training goes on where it was killed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from patch_retriever.scenes.language import caption
from patch_retriever.scenes.render import render
from patch_retriever.scenes.world import Scene, sample_scene
from real_lm.chatml import ChatMLEncoder
from tiny_mllm.conversations import DESCRIBE, Conversation, Dialogue, conversation
from train_tiny_mllm import to_pixel_values

WINDOW = 16
"""Batches whose conversations are sorted by length together (less padding)."""
CAPTIONS_SHARE = 0.4
"""Of conversations that are one full description: most answered tokens for an image."""
TEXT_SHARE = 0.1
"""Of conversations without an image, so that texts are answered in one word, too."""


@dataclass(frozen=True)
class Lesson:
    """A batch: ids, labels and attention mask (n, longest), and pixels of those with an image."""

    ids_nt: Tensor
    labels_nt: Tensor
    mask_nt: Tensor
    pixels_nchw: Tensor | None


def lessons(
    encoder: ChatMLEncoder, seed: int, batch_size: int, start: int, stop: int
) -> Iterator[Lesson]:
    """Those of the steps from `start` to `stop`, with scenes of the `train` split."""
    for window in range(start // WINDOW, -(-stop // WINDOW)):
        rng = random.Random(f"lessons/{seed}/{window}")
        drawn = [_draw(rng, encoder) for _ in range(WINDOW * batch_size)]
        drawn.sort(key=lambda pair: len(pair[1].ids))
        chunks = [drawn[k : k + batch_size] for k in range(0, len(drawn), batch_size)]
        rng.shuffle(chunks)
        for step, chunk in enumerate(chunks, start=window * WINDOW):
            if start <= step < stop:
                yield _lesson(encoder, chunk, random.Random(f"views/{seed}/{step}"))


def captions(encoder: ChatMLEncoder, split: str, seed: int, n: int) -> Lesson:
    """`n` full descriptions of scenes of another split, to look at the training by."""
    rng = random.Random(f"captions/{seed}")
    scenes = [sample_scene(rng, split) for _ in range(n)]
    return _lesson(encoder, [(s, encoder.encode(_described(rng, s))) for s in scenes], rng)


def _draw(rng: random.Random, encoder: ChatMLEncoder) -> tuple[Scene, Conversation]:
    scene = sample_scene(rng, "train")
    kind = rng.random()
    if kind < CAPTIONS_SHARE:
        dialogue = _described(rng, scene)
    else:
        dialogue = conversation(rng, scene, with_image=kind < 1 - TEXT_SHARE)
    return scene, encoder.encode(dialogue)


def _described(rng: random.Random, scene: Scene) -> Dialogue:
    return Dialogue(((DESCRIBE["full"], caption(rng, scene, "full").text),), True)


def _lesson(
    encoder: ChatMLEncoder, batch: list[tuple[Scene, Conversation]], rng: random.Random
) -> Lesson:
    ids_nt, labels_nt, mask_nt = encoder.pad([c for _, c in batch])
    views = [np.asarray(render(s, rng.randrange(1000))) for s, c in batch if c.with_image]
    pixels_nchw = to_pixel_values(np.stack(views)) if views else None
    return Lesson(ids_nt, labels_nt, mask_nt, pixels_nchw)
