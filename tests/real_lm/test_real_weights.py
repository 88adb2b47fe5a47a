"""The language model inside is the package's, whole: its weights, its logits, its chat format."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from real_lm.text_model import find_gguf
from real_models import PACKAGES

TEXTS = ("The capital of France is", "a large striped red heart at the top left")
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names inside a layer, and transformers'."""
HEADS = {"attn_q": 9, "attn_k": 3}


@pytest.fixture(scope="module", params=["real_llava", "real_idefics3"])
def loaded(request):
    """A model as transformers loads it, and its processor."""
    folder = request.getfixturevalue(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="module")
def dequantised(real_text):
    """The weights as `gguf` itself dequantises them, by transformers' names."""
    del real_text  # it makes `gguf` importable
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = {}
    for tensor in GGUFReader(find_gguf(Path(os.environ[PACKAGES]))).tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        part, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        if heads := HEADS.get(name):  # llama.cpp interleaves the two halves that are rotated
            halves = values.reshape(heads, -1, 2, values.shape[-1])
            values = halves.transpose(1, 2).reshape(values.shape)
        if part:
            found[f"layers.{part.removeprefix('blk.')}.{NAMES[name]}.weight"] = values
        else:
            found[{"token_embd": "embed_tokens", "output_norm": "norm"}[name] + ".weight"] = values
    return found


def test_its_weights_are_those_of_the_file(loaded, dequantised):
    model, _ = loaded
    own = getattr(model.model, "language_model", None) or model.model.text_model
    state = own.state_dict()
    assert state.keys() == dequantised.keys()
    assert len(state) == 30 * len(NAMES) + 2
    vocabulary = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = vocabulary[: len(dequantised["embed_tokens.weight"])]
    for name, expected in dequantised.items():
        assert torch.equal(state[name], expected), name
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_its_logits_for_texts_are_the_language_models(loaded, real_text):
    model, processor = loaded
    batch = real_text.tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    again = processor.tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    with torch.no_grad():
        expected = real_text.model(**batch).logits
        found = model(**batch).logits
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-4)
    (first,) = expected[0, batch["attention_mask"][0].sum() - 1].topk(1).indices.tolist()
    assert real_text.tokenizer.decode(first) == " Paris"


def test_its_template_writes_chatml_as_the_language_models_own_does(loaded, real_text):
    _, processor = loaded
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who are you?"},
    ]
    expected = real_text.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    assert processor.apply_chat_template(parts, add_generation_prompt=True) == expected
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(image, add_generation_prompt=True) == (
        "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\n"
    )
    # it has no system turn unless the chat has one
    assert "system" in real_text.tokenizer.apply_chat_template(chat[1:], tokenize=False)
    assert "system" not in processor.apply_chat_template(chat[1:])
