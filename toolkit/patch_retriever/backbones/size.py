"""How large a backbone is, from its config alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patch_retriever.errors import UserError, first_line

ASSUMED_IMAGE_TOKENS = 1000
"""Where a config does not say how many tokens an image takes (it depends on the image's size)."""


@dataclass(frozen=True)
class BackboneSize:
    """What the cost of a forward pass depends on."""

    parameters: int
    """Of all parts."""
    decoder_parameters: int
    """Of the parts that every token goes through: all but embeddings and the vision tower."""
    width: int
    layers: int
    image_tokens: int
    image_tokens_from: str
    """Where that number is from, for who reads a plan."""


def backbone_size(name_or_path: str, revision: str | None = None) -> BackboneSize:
    """The size of a model in a folder or on the hub; its modules are made without memory.

    Raises:
        UserError: its config cannot be read, or this transformers has no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{name_or_path}: its size cannot be read ({first_line(error)})") from None
    finally:
        logging.set_verbosity(level)
    text = config.get_text_config()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    vision = sum(n for name, n in sizes.items() if "vision" in name or "vqmodel" in name)
    embeddings = sum(p.numel() for p in model.get_input_embeddings().parameters())
    tokens, source = _image_tokens(config)
    return BackboneSize(
        sum(sizes.values()),
        sum(sizes.values()) - vision - embeddings,
        text.hidden_size,
        text.num_hidden_layers,
        tokens,
        source,
    )


def _image_tokens(config: Any) -> tuple[int, str]:
    """How many tokens an image takes, and where that is from."""
    for name in ("mm_tokens_per_image", "image_seq_length"):
        if isinstance(found := getattr(config, name, None), int):
            return found, f"{name} in its config"
    vision = getattr(config, "vision_config", None)
    fixed = getattr(vision, "num_image_tokens", None)
    if isinstance(fixed, int):
        return fixed, "num_image_tokens in its config"
    return ASSUMED_IMAGE_TOKENS, "assumed: its config does not say"
