"""A CLIP: a model without a chat template, which takes texts and pictures one kind at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from commands import error_line, invoke
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.scenes.tasks import scenes_collection

ITEMS = scenes_collection("test", 4, 0).items
TEXTS = [item for item in ITEMS if item.kind == "text"]
PICTURES = [item for item in ITEMS if item.kind == "image"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder with a CLIP of random weights, as it is on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    words = sorted({word for item in TEXTS for word in item.text.replace(",", " ,").split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<end>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=64,
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **small,
            "num_hidden_layers": 2,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**small, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, fast).save_pretrained(folder)
    return folder


def test_texts_and_pictures_are_encoded_each_by_its_tower(clip):
    model = SentenceTransformer(str(clip))
    mixed = [item for pair in zip(TEXTS, PICTURES, strict=False) for item in pair]
    found = load_encoder(str(clip)).embed(mixed, "document", batch_size=4)
    texts, pictures = (
        model.encode([item.load_plain() for item in mixed[start::2]]) for start in (0, 1)
    )
    for rows, expected in ((found[::2], texts), (found[1::2], pictures)):
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_what_it_does_not_take_is_told(clip):
    both = Item("a star", PICTURES[0].picture)
    with pytest.raises(UserError, match="tiny-clip: cannot encode these items"):
        load_encoder(str(clip)).embed([both], "query")


def test_it_is_evaluated_beside_ours(clip, finished_build):
    said = invoke("evaluate", finished_build, "--against", clip, "--n", 5, "--only", "t->i full")
    assert said.exit_code == 0, said.stderr
    assert "against tiny-clip" in said.stdout
    line = error_line(invoke("evaluate", clip, "--n", 5, "--only", "it->i"))
    assert "tiny-clip: cannot encode these items" in line


def test_it_indexes_and_finds_its_pictures(clip, photo_folder, tmp_path):
    made = invoke("index", photo_folder, "-m", clip, "-o", tmp_path / "ix")
    assert made.exit_code == 0, made.stderr
    found = invoke("search", tmp_path / "ix", photo_folder / "7.png", "-k", 1)
    assert found.stdout.splitlines()[1].split() == ["1", "1.0000", "7.png"]


def test_items_of_several_pictures_are_refused(clip):
    item = Item.of(None, [PICTURES[0].picture, PICTURES[1].picture])
    with pytest.raises(UserError, match="takes one picture an item"):
        load_encoder(str(clip)).embed([item], "query")
