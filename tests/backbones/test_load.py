"""Loading backbones: what is refused, in one line, and what a good one gives."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import ONE_WORD, PLAIN, Readout
from patch_retriever.errors import UserError

INPUTS = [
    [{"role": "user", "content": [{"type": "text", "text": "a cat on a mat"}]}],
    [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (72, 72), "red")}]}],
]


def refusal(name):
    with pytest.raises(UserError) as error:
        load_backbone(str(name))
    assert "\n" not in str(error.value)
    assert str(name) in str(error.value)
    return str(error.value)


@pytest.fixture
def copied(random_model, tmp_path):
    return shutil.copytree(random_model, tmp_path / "model")


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


def test_an_unknown_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/model", "a/b/c", "~/model"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id(name):
    assert "no such folder" in refusal(name)


def test_a_hub_id_that_cannot_be_reached():
    assert "cannot be reached" in refusal("no-such-organisation/no-such-model")


def test_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "not a folder" in refusal(file)


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert "config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not json"])
def test_a_damaged_config(copied, text):
    (copied / "config.json").write_text(text)
    assert "damaged" in refusal(copied)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"model_type": "no-such-family"}'])
def test_a_config_of_no_known_model(copied, text):
    (copied / "config.json").write_text(text)
    refusal(copied)


def test_truncated_weights(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot be loaded" in refusal(copied)


def test_missing_weights(copied):
    (copied / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(copied)


def test_weights_of_another_shape_than_the_config_says(copied):
    values = json.loads((copied / "config.json").read_text())
    values["text_config"]["intermediate_size"] *= 2
    (copied / "config.json").write_text(json.dumps(values))
    assert "another shape than config.json says" in refusal(copied)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_damaged_tokenizer(copied, text):
    (copied / "tokenizer.json").write_text(text)
    assert "cannot be loaded" in refusal(copied)


def test_a_text_only_model(tmp_path):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "cat": 1}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = Qwen2Config(
        vocab_size=2,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "text-only" in refusal(tmp_path)


def test_a_model_of_images_and_texts_that_is_no_llm(tmp_path):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "cat": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = CLIPConfig(
        text_config={**small, "vocab_size": 2, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(tmp_path)
    assert "no image token in its text" in refusal(tmp_path)


def test_a_good_model_loads_in_float32_for_inference(transformer):
    parameters = list(transformer.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not any(p.requires_grad for p in parameters)
    assert not transformer.model.training
    assert transformer.get_embedding_dimension() == 32


def test_a_model_in_bfloat16_is_loaded_in_float32_unless_asked(copied):
    values = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    assert {p.dtype for p in load_backbone(str(copied)).parameters()} == {torch.float32}
    half = load_backbone(str(copied), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    asis = load_backbone(str(copied), dtype="auto")
    assert {p.dtype for p in asis.parameters()} == {torch.bfloat16}


def hidden_states(transformer, features):
    tensors = {k: v for k, v in features.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        return transformer.model(**tensors, output_hidden_states=True)


def test_last_hidden_state_is_what_the_model_gives(transformer):
    set_readout(transformer, Readout(PLAIN))
    features = transformer.preprocess(INPUTS)
    out = hidden_states(transformer, features)
    with torch.no_grad():
        found = transformer(dict(features))["token_embeddings"]
    assert torch.equal(found, out.last_hidden_state)


@pytest.mark.parametrize("layer", [0, 1])
def test_site_layers_n_is_the_hidden_state_after_layer_n(transformer, layer):
    set_readout(transformer, Readout(PLAIN, f"layers.{layer}"))
    features = transformer.preprocess(INPUTS)
    expected = hidden_states(transformer, features).hidden_states[layer + 1]
    with torch.no_grad():
        found = transformer(dict(features))["token_embeddings"]
    assert torch.equal(found, expected)


def test_a_readout_does_not_leave_anything_of_the_one_before(transformer):
    with torch.no_grad():
        set_readout(transformer, Readout(PLAIN))
        first = transformer(transformer.preprocess(INPUTS))["token_embeddings"]
        set_readout(transformer, Readout(ONE_WORD, "layers.0", "lasttoken"))
        set_readout(transformer, Readout(PLAIN))
        again = transformer(transformer.preprocess(INPUTS))["token_embeddings"]
    assert torch.equal(first, again)


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_model_with_a_readout_pools_and_normalises(transformer, pooling):
    model = with_readout(transformer, Readout(PLAIN, pooling=pooling))
    features = transformer.preprocess(INPUTS)
    with torch.no_grad():
        tokens_ntd = transformer(dict(features))["token_embeddings"]
    found_nd = model.encode(INPUTS, convert_to_tensor=True)
    for found_d, token_td, mask_t in zip(
        found_nd, tokens_ntd, features["attention_mask"].bool(), strict=True
    ):
        item_td = token_td[mask_t]
        expected_d = item_td.mean(0) if pooling == "mean" else item_td[-1]
        assert torch.allclose(found_d, expected_d / expected_d.norm(), atol=1e-6)
