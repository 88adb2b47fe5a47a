"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: as many image tokens as the picture is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families.snapshot import TEXT, WIDTH, byte_level, save

TEMPLATE = """\
{% for message in messages %}@system@<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for content in message['content'] %}\
{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_SYSTEM = """\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}"""
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def _tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(
        **byte_level(*_SPECIAL),
        eos_token="<|im_end|>",
        additional_special_tokens=list(_SPECIAL[1:]),
    )


def _config(tokenizer: Any, rope: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    special = {"bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>")}
    text = {**TEXT, **special, "vocab_size": len(tokenizer) + 9, "rope_parameters": rope}
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def _processor(name: str, patch_size: int) -> dict[str, Any]:
    """2 x 2 to 4 x 4 image tokens."""
    token_pixels = (2 * patch_size) ** 2
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{name}Processor",
            "size": {"shortest_edge": 4 * token_pixels, "longest_edge": 16 * token_pixels},
            "patch_size": patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
        }
    }


_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


def qwen2_vl(folder: Path) -> None:
    """Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = _tokenizer()
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(**_config(tokenizer, _ROPE, vision))
    files = _processor("Qwen2VL", patch_size=14)
    template = TEMPLATE.replace("@system@", _SYSTEM)
    save(folder, Qwen2VLForConditionalGeneration, config, tokenizer, files, template)


def qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL: attention in windows in its tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    vision = {
        **_TOWER,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(**_config(tokenizer, _ROPE, vision))
    files = _processor("Qwen2_5_VL", patch_size=14)
    template = TEMPLATE.replace("@system@", _SYSTEM)
    save(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, files, template)


def qwen3_vl(folder: Path) -> None:
    """Qwen3-VL: image features of two depths, the second added after the first decoder layer."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = _tokenizer()
    vision = {
        **_TOWER,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    values = _config(tokenizer, {**rope, "mrope_interleaved": True}, vision)
    values["text_config"]["head_dim"] = 16
    files = _processor("Qwen3VL", patch_size=16)
    files["video_preprocessor_config.json"] = {
        **files["preprocessor_config.json"],
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    template = TEMPLATE.replace("@system@", "")
    save(
        folder, Qwen3VLForConditionalGeneration, Qwen3VLConfig(**values), tokenizer, files, template
    )
