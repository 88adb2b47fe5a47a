"""Chameleon: pictures are tokens of the vocabulary, by way of a VQ-VAE."""

from __future__ import annotations

from pathlib import Path

from families.snapshot import TEXT, byte_level_backend, save

N_CODES = 16


def chameleon(folder: Path) -> None:
    """Chameleon: 4 image tokens of a book of 16; its processor knows no chat template."""
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    # a code's number in letters, A to J for 0 to 9, as the model's vocabulary map reads it
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = [f"IMGIMG{str(i).translate(letters)}Z" for i in range(N_CODES)]
    named = ("<s>", "<pad>", "</s>", "<unk>", "<racm3:break>", "<eoss>", "<image>", "<reserved1>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(*named, *codes),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<reserved1>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<racm3:break>",
            "eoi_token": "<eoss>",
        },
    )
    config = ChameleonConfig(
        vocab_size=len(tokenizer),
        vocabulary_map=tokenizer.get_vocab(),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": N_CODES,
            "latent_channels": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        **TEXT,
    )
    image_processor = {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    processor = {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": 4,
        "image_token": "<image>",
    }
    files = {"preprocessor_config.json": image_processor, "processor_config.json": processor}
    save(folder, ChameleonForConditionalGeneration, config, tokenizer, files)
