"""Gemma 3 and PaliGemma 2."""

from __future__ import annotations

from pathlib import Path

from families.snapshot import TEXT, VISION, WIDTH, save, sentence_piece

GEMMA3_TEMPLATE = """\
{{ bos_token }}{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set content = messages[0]['content'] -%}
    {%- set system = (content if content is string else content[0]['text']) + '\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
_TURNS = {"start_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"}
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_TURNS.values())
_HEADS = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 256}


def gemma3(folder: Path) -> None:
    """Gemma 3: SigLIP and Gemma 3, 4 image tokens between a start and an end."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        GemmaTokenizer,
        SiglipVisionConfig,
    )

    special = (*_SPECIAL, "<start_of_image>", "<end_of_image>", "<image_soft_token>")
    tokenizer = GemmaTokenizer(
        **sentence_piece(*special, "\n\n"),
        add_bos_token=True,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            **{f"{name}_token": token for name, token in _TURNS.items()},
        },
    )
    ids = tokenizer.convert_tokens_to_ids
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, vision_use_head=False
        ),
        text_config=Gemma3TextConfig(vocab_size=len(tokenizer) + 9, layer_types=layers, **_HEADS),
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )
    image_processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": None,
    }
    files = {
        "preprocessor_config.json": image_processor,
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    }
    save(folder, Gemma3ForConditionalGeneration, config, tokenizer, files, GEMMA3_TEMPLATE)


def paligemma2(folder: Path) -> None:
    """PaliGemma 2: SigLIP and Gemma 2, 9 image tokens; no chat template, like the real ones."""
    from transformers import (
        Gemma2Config,
        GemmaTokenizer,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )
    from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

    tokenizer = GemmaTokenizer(
        **sentence_piece(*_SPECIAL, "<image>"),
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens(EXTRA_TOKENS)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            **VISION, image_size=42, patch_size=14, vision_use_head=False
        ),
        text_config=Gemma2Config(vocab_size=len(tokenizer) + 9, **_HEADS),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    image_processor = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": 9,
        "size": {"height": 42, "width": 42},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    files = {"preprocessor_config.json": image_processor}
    save(folder, PaliGemmaForConditionalGeneration, config, tokenizer, files)
