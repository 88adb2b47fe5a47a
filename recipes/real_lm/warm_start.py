"""A start for the projector: image tokens that stand for words about what they show.

The four patches of a cell get the text embeddings of the size, the fill, the colour and the shape
of what stands there (or of the background, four times), each with some of the embedding of the
cell's place added. That is an ordinary regression from the tower's features, minutes on one core,
after which the language model is shown something like words instead of noise.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patch_retriever.scenes.render import render
from patch_retriever.scenes.world import PLACES, Scene, sample_scene
from train_tiny_mllm import to_pixel_values

PLACE_SHARE = 0.5
"""Of the place's embedding, added to the word's."""
BATCH = 64
"""Images a step."""


def fit_projector(model: Any, tokenizer: Any, steps: int, seed: int) -> float:
    """Fit the projector of a LLaVA to words; returns the share of patches, on held-out scenes,
    whose image token is nearest to the word it should be.

    The tower and the language model stay as they are.
    """
    words = Words(model, tokenizer)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps + 1)
    rng = random.Random(f"warm start/{seed}")
    for _ in range(steps):
        found_pd, target_p, place_p = _projected(model, words, rng, "train")
        loss = nn.functional.mse_loss(found_pd, words(target_p, place_p))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    projector.requires_grad_(False)
    with torch.no_grad():
        found_pd, target_p, place_p = _projected(model, words, rng, "validation")
        nearest_p = words.nearest(found_pd, place_p)
    return float((nearest_p == target_p).float().mean())


class Words:
    """The words of drawn scenes as text embeddings of the language model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._numbers: dict[str, int] = {}
        self._rows: list[Tensor] = []
        self._place_kd = torch.stack([self._embedding(place) for place in PLACES])

    def numbers(self, scene: Scene) -> Tensor:
        """The word of each of the 6 x 6 patches, row by row, as numbers (36,)."""
        grid_pp = np.full((6, 6), self._number(scene.background))
        for thing in scene.things:
            row, column = divmod(thing.place, 3)
            words = (thing.size, thing.fill, thing.colour, thing.shape)
            for i, word in enumerate(words):
                grid_pp[2 * row + i // 2, 2 * column + i % 2] = self._number(word)
        return torch.from_numpy(grid_pp.flatten())

    def __call__(self, word_p: Tensor, place_p: Tensor) -> Tensor:
        """What image tokens are to be (p, d), by numbers of words and places."""
        return torch.stack(self._rows)[word_p] + PLACE_SHARE * self._place_kd[place_p]

    def nearest(self, found_pd: Tensor, place_p: Tensor) -> Tensor:
        """Numbers (p,) of the words that image tokens are nearest to."""
        without_pd = found_pd - PLACE_SHARE * self._place_kd[place_p]
        return torch.cdist(without_pd, torch.stack(self._rows)).argmin(dim=1)

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self._rows)
            self._rows.append(self._embedding(word))
        return self._numbers[word]

    def _embedding(self, word: str) -> Tensor:
        ids = self._tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return self._model.get_input_embeddings().weight[ids].detach().mean(dim=0)


def _projected(
    model: Any, words: Words, rng: random.Random, split: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens (p, d) of random scenes with the numbers (p,) of their words and places."""
    scenes = [sample_scene(rng, split) for _ in range(BATCH)]
    pixels_nhwc = np.stack([np.asarray(render(s, rng.randrange(1000))) for s in scenes])
    found_npd = model.get_image_features(to_pixel_values(pixels_nhwc)).pooler_output
    found_pd = torch.cat(list(found_npd))
    word_p = torch.cat([words.numbers(scene) for scene in scenes])
    side = math.isqrt(len(found_pd) // BATCH)
    row_pp, column_pp = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place_p = (row_pp // 2 * 3 + column_pp // 2).flatten().repeat(BATCH)
    return found_pd, word_p, place_p
