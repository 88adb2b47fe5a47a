"""What the built-in MLLM is taught: conversations about scenes, with and without a picture."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patch_retriever.scenes.language import (
    QUESTION_KINDS,
    caption,
    edit_instruction,
    one_word,
    question,
    sentence,
)
from patch_retriever.scenes.world import Scene, sample_edit

IGNORED = -100
"""Label of a position without a loss (torch's convention)."""

DESCRIBE = {
    "full": "describe the image.",
    "paraphrase": "describe the image in other words.",
    "plain": "name the shapes and their places.",
    "short": "describe the image briefly.",
    "terse": "give some keywords.",
    "chatty": "chat about the image.",
    "web": "write a web title for the image.",
    "count": "how many shapes, on which background?",
}
_STYLE_WEIGHTS = {"full": 8, "paraphrase": 2, "plain": 4}
_ONE_WORD = (
    "describe the {it} in one word.",
    "summarize the above {it} in one word:",
    "{it} in one word:",
)


@dataclass(frozen=True)
class Dialogue:
    """Turns of (what the user says, what the assistant answers); the picture comes first."""

    turns: tuple[tuple[str, str], ...]
    with_image: bool


@dataclass(frozen=True)
class Conversation:
    """A dialogue as token ids with labels (`IGNORED` where the user speaks)."""

    ids: list[int]
    labels: list[int]
    with_image: bool


def conversation(rng: random.Random, scene: Scene, with_image: bool) -> Dialogue:
    """A random conversation about `scene`; without a picture, about a text that describes it."""
    if with_image:
        return Dialogue(tuple(_about(rng, scene, "image", "")), True)
    kind = rng.random()
    if kind < 0.1:
        thing = rng.choice(scene.things)
        said = f"write a sentence with {thing.colour} or {thing.shape}."
        return Dialogue(((said, sentence(rng, scene)),), False)
    text = caption(rng, scene, rng.choice(("full", "full", "paraphrase"))).text + "\n"
    return Dialogue(tuple(_about(rng, scene, "sentence", text)), False)


def _about(rng: random.Random, scene: Scene, it: str, text: str) -> list[tuple[str, str]]:
    """Turns about the picture or (`text`) the sentence that the first turn shows."""
    kind = rng.random()
    if kind < 0.34:
        style = rng.choices(list(DESCRIBE), [_STYLE_WEIGHTS.get(s, 1) for s in DESCRIBE])[0]
        asked = DESCRIBE[style].replace("image", it)
        return [(text + asked, caption(rng, scene, style).text)]
    if kind < 0.50:
        edit = sample_edit(rng, scene)
        request = f"{text}{edit_instruction(edit)}. "
        if rng.random() < 0.4:
            both = "image and sentence"
            asked = rng.choice(_ONE_WORD).format(it=rng.choice((both, "result")))
            return [(request + asked, one_word(rng, edit.target)), *_questions(rng, edit.target, 2)]
        style = rng.choice(("full", "plain", "plain", "short"))
        return [
            (
                request + DESCRIBE[style].replace("image", "result"),
                caption(rng, edit.target, style).text,
            )
        ]
    if kind < 0.72:
        asked = rng.choice(_ONE_WORD).format(it=it)
        return [(text + asked, one_word(rng, scene)), *_questions(rng, scene, 3)]
    first, *rest = _questions(rng, scene, 4)
    return [(text + first[0], first[1]), *rest]


def _questions(rng: random.Random, scene: Scene, n: int) -> list[tuple[str, str]]:
    return [question(rng, scene, rng.choice(QUESTION_KINDS)) for _ in range(n)]


class Encoder:
    """Dialogues to token ids, as the processor's chat template would write them."""

    def __init__(self, processor: Any, n_image_tokens: int) -> None:
        self.tokenizer = processor.tokenizer
        to_id = self.tokenizer.convert_tokens_to_ids
        self.pad_id, self.end = to_id("<pad>"), to_id("<|end|>")
        self.user, self.assistant = to_id("<|user|>"), to_id("<|assistant|>")
        self.image = [to_id("<image>")] * n_image_tokens

    def encode(self, dialogue: Dialogue) -> Conversation:
        """Ids and labels; every token of a text-only dialogue counts, else only the answers."""
        ids: list[int] = []
        labels: list[int] = []
        texts = [text for turn in dialogue.turns for text in turn]
        pieces = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for turn, (said, answer) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
            image = self.image if dialogue.with_image and turn == 0 else []
            asked = [self.user, *image, *said, self.end, self.assistant]
            ids += [*asked, *answer, self.end]
            silent = (
                [IGNORED] * len(asked)
                if dialogue.with_image
                else [self.user, *said, self.end, self.assistant]
            )
            labels += [*silent, *answer, self.end]
        return Conversation(ids, labels, dialogue.with_image)

    def pad(self, batch: list[Conversation]) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded ids, labels and attention mask, each (n, longest)."""
        longest = max(len(c.ids) for c in batch)
        ids = torch.full((len(batch), longest), self.pad_id)
        labels = torch.full((len(batch), longest), IGNORED)
        attention = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, c in enumerate(batch):
            ids[row, : len(c.ids)] = torch.tensor(c.ids)
            labels[row, : len(c.ids)] = torch.tensor(c.labels)
            attention[row, : len(c.ids)] = 1
        return ids, labels, attention
