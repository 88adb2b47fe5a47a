"""Idefics3, the family of SmolVLM, around the real language model, which is SmolVLM's own.

The tower is small and random; an image becomes four tiles and the whole, nine tokens each.
"""

from __future__ import annotations

from typing import Any

import torch

from patch_retriever.scenes.render import IMAGE_SIZE
from real_lm.assembly import put_weights, scale_image_tokens, text_config_of, with_tokens
from real_lm.chatml import CHAT_TEMPLATE
from real_lm.text_model import TextModel

TILES = 2
"""Rows and columns of tiles."""
PATCH_SIZE = 12
SCALE = 2
"""So many patches on a side become one token."""
IMAGE_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
)


def make_idefics3(text: TextModel, seed: int = 0) -> tuple[Any, Any]:
    """An `Idefics3ForConditionalGeneration` in float32 and its processor, which needs no
    torchvision.

    Args:
        text: the language model and its tokenizer.
        seed: of the weights of the tower and the projector.
    """
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    tokenizer = with_tokens(text.tokenizer, IMAGE_TOKENS)
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": TILES * IMAGE_SIZE},
            max_image_size={"longest_edge": IMAGE_SIZE},
            do_image_splitting=True,
            do_pad=True,
        ),
        tokenizer=tokenizer,
        image_seq_len=(IMAGE_SIZE // PATCH_SIZE // SCALE) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    config = Idefics3Config(
        vision_config={
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config=text_config_of(text, len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SCALE,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Idefics3ForConditionalGeneration(config)
    model.generation_config = text.model.generation_config
    put_weights(model.model.text_model, text)
    scale_image_tokens(model, processor, model.model.connector.modality_projection.proj, text)
    return model.eval(), processor
