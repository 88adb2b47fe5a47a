"""What the families share: the language model's weights in an MLLM, image tokens of their size."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from patch_retriever.scenes.render import render
from patch_retriever.scenes.world import sample_scene
from real_lm.text_model import TextModel


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A copy of the tokenizer with special tokens added at its end."""
    extended = copy.deepcopy(tokenizer)
    added = extended.add_special_tokens({"additional_special_tokens": list(tokens)})
    assert added == len(tokens), "some of them were there before"
    return extended


def text_config_of(text: TextModel, n_tokens: int) -> Any:
    """The language model's config with a vocabulary of `n_tokens`."""
    config = copy.deepcopy(text.model.config)
    config.vocab_size = n_tokens
    return config


def put_weights(language_model: nn.Module, text: TextModel) -> None:
    """Copy the language model's weights into that of an MLLM with a larger vocabulary.

    The rows of added tokens are the mean of the others, as in transformers' resizing.
    """
    state = text.model.model.state_dict()
    own_vd = state["embed_tokens.weight"]
    target_vd: Tensor = language_model.get_submodule("embed_tokens").weight  # type: ignore[assignment]
    added_d = own_vd.mean(dim=0, keepdim=True)
    state["embed_tokens.weight"] = torch.cat(
        [own_vd, added_d.expand(len(target_vd) - len(own_vd), -1)]
    )
    language_model.load_state_dict(state)


def sample_images(n: int) -> list[Image.Image]:
    """Drawn scenes of the `train` split, always the same."""
    rng = random.Random("projector")
    return [render(sample_scene(rng, "train")) for _ in range(n)]


@torch.no_grad()
def scale_image_tokens(model: Any, processor: Any, last: nn.Linear, text: TextModel) -> None:
    """Scale the projector's last layer so that image tokens have the text embeddings' mean norm."""
    pixels = processor.image_processor(sample_images(32), return_tensors="pt")
    tokens_nd = image_tokens(model, pixels).flatten(0, -2)
    embeddings_vd = text.model.get_input_embeddings().weight
    factor = embeddings_vd.norm(dim=1).mean() / tokens_nd.norm(dim=1).mean()
    for parameter in last.parameters():
        parameter.mul_(factor)


def image_tokens(model: Any, pixels: dict[str, Tensor]) -> Tensor:
    """What stands in place of the image tokens (images, tokens, d), before the language model."""
    found = model.get_image_features(**pixels).pooler_output
    return found if isinstance(found, Tensor) else torch.stack(list(found))
