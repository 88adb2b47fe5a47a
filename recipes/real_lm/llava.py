"""LLaVA around the real language model, with the tower of the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from patch_retriever.backbones.load import built_in_model
from real_lm.assembly import put_weights, scale_image_tokens, text_config_of, with_tokens
from real_lm.chatml import CHAT_TEMPLATE
from real_lm.text_model import TextModel

IMAGE_TOKEN = "<image>"


def make_llava(text: TextModel, seed: int = 0, tower_of: Path | None = None) -> tuple[Any, Any]:
    """A `LlavaForConditionalGeneration` in float32 and its processor.

    The tower has learnt to see drawn scenes; the projector is random, its outputs of the size of
    text embeddings.

    Args:
        text: the language model and its tokenizer.
        seed: of the projector's weights.
        tower_of: folder of the LLaVA whose tower is taken; None for the built-in model.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    folder = tower_of or built_in_model()
    donor: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    donors: Any = LlavaProcessor.from_pretrained(folder)
    tokenizer = with_tokens(text.tokenizer, [IMAGE_TOKEN])
    processor = LlavaProcessor(
        image_processor=donors.image_processor,
        tokenizer=tokenizer,
        patch_size=donors.patch_size,
        vision_feature_select_strategy=donors.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=donor.config.vision_config,
        text_config=text_config_of(text, len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=donor.config.image_seq_length,
        vision_feature_layer=donor.config.vision_feature_layer,
        vision_feature_select_strategy=donor.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
    model.generation_config = text.model.generation_config
    put_weights(model.model.language_model, text)
    model.model.vision_tower.load_state_dict(donor.model.vision_tower.state_dict())
    scale_image_tokens(model, processor, model.model.multi_modal_projector.linear_2, text)
    return model.eval(), processor
