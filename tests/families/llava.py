"""LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision and InternVL 3, as their `-hf` checkpoints are."""

from __future__ import annotations

from pathlib import Path

from families.snapshot import TEXT, VISION, byte_level, save, sentence_piece

LLAVA_TEMPLATE = """\
{% for message in messages %}\
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}\
{% endfor %}{# Render all text next #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] + ' '}}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
NEXT_TEMPLATE = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}\
{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}\
{% elif message['role'] == 'user' %}{{ '[INST] ' }}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}\
{% endfor %}{# Render all text next #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] }}{% endfor %}{{' [/INST]' }}\
{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"""
ONEVISION_TEMPLATE = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}\
{% endfor %}{# Render all text next #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ '\\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
INTERNVL_TEMPLATE = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}\
{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}\
{{'<|im_end|>\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"""

PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
"""Sizes that a picture is cut into tiles at."""


def llava(folder: Path) -> None:
    """LLaVA 1.5: CLIP and Llama, 9 image tokens (the tower's class token is dropped)."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer = LlamaTokenizer(
        **sentence_piece(*special),
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=42, patch_size=14),
        text_config=LlamaConfig(vocab_size=len(tokenizer) + 9, **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": 42},
        "crop_size": {"height": 42, "width": 42},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    files = {"preprocessor_config.json": image_processor, "processor_config.json": processor}
    save(folder, LlavaForConditionalGeneration, config, tokenizer, files, LLAVA_TEMPLATE)


def llava_next(folder: Path) -> None:
    """LLaVA-NeXT (Mistral): CLIP, the picture whole and in tiles, ends of lines between."""
    from transformers import (
        CLIPVisionConfig,
        LlamaTokenizer,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        MistralConfig,
    )

    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer = LlamaTokenizer(
        **sentence_piece(*special),
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=28, patch_size=14),
        text_config=MistralConfig(vocab_size=len(tokenizer) + 9, head_dim=16, **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_grid_pinpoints": PINPOINTS,
    }
    processor = {
        "processor_class": "LlavaNextProcessor",
        "image_token": "<image>",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    files = {"preprocessor_config.json": image_processor, "processor_config.json": processor}
    save(folder, LlavaNextForConditionalGeneration, config, tokenizer, files, NEXT_TEMPLATE)


def llava_onevision(folder: Path) -> None:
    """LLaVA-OneVision: SigLIP and Qwen2, the picture whole and in tiles, ends of lines between."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        Qwen2Tokenizer,
        SiglipVisionConfig,
    )

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer = Qwen2Tokenizer(
        **byte_level(*special),
        eos_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "turn_token": "<|im_start|>",
        },
    )
    ids = tokenizer.convert_tokens_to_ids
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **VISION, image_size=28, patch_size=14, vision_use_head=False
        ),
        text_config=Qwen2Config(vocab_size=len(tokenizer) + 9, **TEXT),
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    size = {"height": 28, "width": 28}
    image_processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "size": size,
        "image_grid_pinpoints": PINPOINTS,
    }
    video_processor = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
    }
    files = {
        "preprocessor_config.json": image_processor,
        "video_preprocessor_config.json": video_processor,
        "processor_config.json": processor,
    }
    save(
        folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, files, ONEVISION_TEMPLATE
    )


def internvl(folder: Path) -> None:
    """InternVL 3: its own tower and Qwen2, 4 image tokens a tile."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
        Qwen2Tokenizer,
    )

    special = (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    )
    tokenizer = Qwen2Tokenizer(
        **byte_level(*special),
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "turn_token": "<|im_start|>",
        },
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION, image_size=56, patch_size=14),
        text_config=Qwen2Config(vocab_size=len(tokenizer) + 9, **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    size = {"height": 56, "width": 56}
    image_processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": size,
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 3,
    }
    video_processor = {"video_processor_type": "InternVLVideoProcessor", "size": size}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    files = {
        "preprocessor_config.json": image_processor,
        "video_preprocessor_config.json": video_processor,
        "processor_config.json": processor,
    }
    save(folder, InternVLForConditionalGeneration, config, tokenizer, files, INTERNVL_TEMPLATE)
