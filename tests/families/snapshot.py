"""What the stand-ins share: vocabularies, the text half of a config, files as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WIDTH = 32
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
"""The shape of every language model."""
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
"""The shape of every vision tower that says it in these words."""

_TEXTS = (
    "a cat on a mat and two small dogs",
    "You are a helpful assistant.\n",
    "user\nassistant\nsystem\nUser: Assistant: USER: ASSISTANT: model",
    "Summarize the above image and sentence in one word: ",
    "describe the image in one word.",
)


def byte_level(*special: str) -> dict[str, Any]:
    """`vocab` and `merges` of a small byte-level BPE (GPT-2, Qwen2, Llama 3)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(bpe, special, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece(*special: str) -> dict[str, Any]:
    """`vocab` and `merges` of a small BPE with a fallback to bytes (Llama 2, Gemma)."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    lines, words = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    return _trained(bpe, (*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\n"), ["▁"])


def _trained(bpe: Tokenizer, special: tuple[str, ...], alphabet: list[str]) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 100,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    model = json.loads(bpe.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def byte_level_backend(*special: str) -> Tokenizer:
    """The same as `byte_level`, for families whose tokenizer is no class of its own."""
    bpe = Tokenizer(models.BPE(**byte_level(*special)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def save(
    folder: Path,
    model_class: Any,
    config: Any,
    tokenizer: Any,
    files: dict[str, Any],
    chat_template: str | None = None,
) -> None:
    """Write the model with random weights, its tokenizer, the JSON `files` and the template."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():  # of a size at which layers and prompts matter
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
