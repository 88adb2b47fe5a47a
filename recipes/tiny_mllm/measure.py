"""What the built-in MLLM sees on scenes it was never trained on, and its card."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch

from patch_retriever.scenes.language import QUESTION_KINDS, caption, question
from patch_retriever.scenes.render import render
from patch_retriever.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    PLACES,
    SHAPES,
    SIZES,
    sample_scene,
)
from tiny_mllm.conversations import DESCRIBE

_OBJECT = re.compile(
    rf"({'|'.join(SIZES)}) ({'|'.join(FILLS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the "
    rf"({'|'.join(sorted(PLACES, key=len, reverse=True))})\b"
)


def measure(model: Any, processor: Any, split: str, n: int, seed: int) -> dict[str, float]:
    """Greedy answers on `n` scenes of `split`: share of attributes, counts and answers right.

    An attribute counts as named where the generated full caption gives it to the object at its
    place; an object that the caption leaves out counts as wrong in every attribute.
    """
    rng = random.Random(f"measure/{seed}")
    scenes = [sample_scene(rng, split) for _ in range(n)]
    pictures = [render(scene) for scene in scenes]
    said = generate(model, processor, pictures, [DESCRIBE["full"]] * n, max_new_tokens=90)
    names = ("size", "fill", "colour", "shape")
    right = dict.fromkeys((*names, "count", "background", "whole caption"), 0.0)
    n_things = sum(len(scene.things) for scene in scenes)
    for scene, text in zip(scenes, said, strict=True):
        found = {PLACES.index(m[-1]): m for m in _OBJECT.findall(text)}
        for thing in scene.things:
            for i, name in enumerate(names):
                right[name] += found.get(thing.place, ("",) * 4)[i] == getattr(thing, name)
        right["count"] += len(_OBJECT.findall(text)) == len(scene.things)
        backgrounds = re.findall(rf"on an? ({'|'.join(BACKGROUNDS)}) background", text)
        right["background"] += backgrounds == [scene.background]
        right["whole caption"] += text == caption(rng, scene, "full").text
    figures = {k: v / (n_things if k in names else n) for k, v in right.items()}
    asked = [
        question(rng, s, QUESTION_KINDS[i % len(QUESTION_KINDS)]) for i, s in enumerate(scenes)
    ]
    answers = generate(model, processor, pictures, [q for q, _ in asked], max_new_tokens=5)
    hits = [a == b for (_, a), b in zip(asked, answers, strict=True)]
    figures["questions"] = sum(hits) / n
    for k, kind in enumerate(QUESTION_KINDS):
        of_kind = hits[k :: len(QUESTION_KINDS)]
        figures[f"question: {kind}"] = sum(of_kind) / len(of_kind)
    return figures


@torch.inference_mode()
def generate(
    model: Any, processor: Any, pictures: list, asked: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers to one question about each picture, in batches of 50."""
    answers = []
    processor.tokenizer.padding_side = "left"
    for k in range(0, len(pictures), 50):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            for text in asked[k : k + 50]
        ]
        prompts = [
            processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats
        ]
        batch = processor(
            images=pictures[k : k + 50], text=prompts, padding=True, return_tensors="pt"
        )
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    processor.tokenizer.padding_side = "right"
    return answers


def write_card(
    out: Path, figures: dict[str, float], settings: dict[str, Any], seconds: float
) -> None:
    """README.md (the model card) and measures.json beside the weights."""
    (out / "measures.json").write_text(
        json.dumps({"settings": settings, "held-out": figures}, indent=1)
    )
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings.items())
    (out / "README.md").write_text(f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-mllm

The MLLM that patch-retriever ships for its demo and tests: a LLaVA (SigLIP tower, Qwen2 language
model) trained from nothing on procedural scenes of patch-retriever's built-in world. It is good at
describing those scenes and at nothing else.

Trained by `python recipes/train_tiny_mllm.py {flags}` in {seconds / 60:.0f} minutes on 2 cores:
the vision tower on per-cell attributes first (its head is thrown away), then everything with the
causal language-model loss on captions, short answers, single words, edits and text-only sentences.
There is no contrastive or retrieval loss anywhere.

Share right on held-out scenes (the test split; greedy answers; attributes from generated captions):

| what | right |
|---|---|
{rows}
""")
