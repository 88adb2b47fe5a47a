"""Idefics3 and SmolVLM: pictures in tiles, each between tokens of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families.snapshot import TEXT, VISION, byte_level, byte_level_backend, save

TEMPLATE = """\
@start@{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
_PICTURE = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)),
)
_IMAGE_SIZE = 28


def _image_processor(family: str) -> dict[str, Any]:
    return {
        "image_processor_type": f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
        "size": {"longest_edge": 2 * _IMAGE_SIZE},
        "max_image_size": {"longest_edge": _IMAGE_SIZE},
        "do_image_splitting": True,
        "do_pad": True,
    }


def idefics3(folder: Path) -> None:
    """Idefics3: its SigLIP and Llama 3; four tiles and the whole, one token each."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    special = ("<|begin_of_text|>", "<|end_of_text|>", *_PICTURE)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(*special),
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|end_of_text|>",
        additional_special_tokens=list(_PICTURE),
    )
    config = Idefics3Config(
        vision_config={**VISION, "image_size": _IMAGE_SIZE, "patch_size": 14},
        text_config=LlamaConfig(vocab_size=len(tokenizer) + 9, **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    files = {
        "preprocessor_config.json": _image_processor("Idefics3"),
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": 1},
    }
    template = TEMPLATE.replace("@start@", "<|begin_of_text|>")
    save(folder, Idefics3ForConditionalGeneration, config, tokenizer, files, template)


def smolvlm(folder: Path) -> None:
    """SmolVLM 2: the same with GPT-2's tokenizer and a video half."""
    from transformers import (
        GPT2Tokenizer,
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    special = ("<|endoftext|>", "<|im_start|>", *_PICTURE)
    tokenizer = GPT2Tokenizer(
        **byte_level(*special),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    config = SmolVLMConfig(
        vision_config={**VISION, "image_size": _IMAGE_SIZE, "patch_size": 14},
        text_config=LlamaConfig(vocab_size=len(tokenizer) + 9, **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    video_processor = {
        "video_processor_type": "SmolVLMVideoProcessor",
        "size": {"longest_edge": _IMAGE_SIZE},
        "max_image_size": {"longest_edge": _IMAGE_SIZE},
    }
    files = {
        "preprocessor_config.json": _image_processor("SmolVLM"),
        "video_preprocessor_config.json": video_processor,
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 1},
    }
    template = TEMPLATE.replace("@start@", "<|im_start|>")
    save(folder, SmolVLMForConditionalGeneration, config, tokenizer, files, template)
