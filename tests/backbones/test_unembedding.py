"""The logit lens, against logits of the whole vocabulary sorted by hand."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from patch_retriever.backbones import unembedding
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import LAST
from patch_retriever.backbones.unembedding import nearest_tokens
from patch_retriever.probe import Probe

WIDTH, K = 32, 5


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


def directions(n, seed=0):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_sorting(tokenizer, unembedding_vd, direction_d):
    """The tokens with the largest inner products, one by one."""
    logits = [float(row_d @ direction_d) for row_d in unembedding_vd[: len(tokenizer)]]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    return [tokenizer.decode([token]) for token in order[:K]]


@pytest.mark.parametrize("logits", [1, 7_000, 16_777_216])
def test_they_are_the_tokens_with_the_largest_logits(transformer, logits, monkeypatch):
    monkeypatch.setattr(unembedding, "CHUNK_LOGITS", logits)
    rows_cd = directions(9)
    found, source = nearest_tokens(transformer, rows_cd, LAST, K)
    inputs_vd = transformer.model.get_input_embeddings().weight
    for tokens, row_d in zip(found, rows_cd, strict=True):
        assert tokens == by_sorting(transformer.tokenizer, inputs_vd, row_d)
    assert source.startswith("input embeddings")


def test_a_direction_of_a_token_is_nearest_to_it(transformer):
    inputs_vd = transformer.model.get_input_embeddings().weight.detach()
    unit_vd = torch.nn.functional.normalize(inputs_vd, dim=1)
    lengthy = int(inputs_vd.norm(dim=1).argmax())  # no other row can have a larger product
    found, _ = nearest_tokens(transformer, unit_vd[[lengthy]], LAST, 1)
    assert found == [[transformer.tokenizer.decode([lengthy])]]


def test_a_direction_before_the_final_norm_goes_through_it(random_model):
    transformer = load_backbone(str(random_model))
    norm = transformer.model.language_model.norm
    norm.weight.data = 3 * torch.rand(WIDTH, generator=torch.Generator().manual_seed(1))
    Probe(transformer)  # as in a build, where nnsight has wrapped the model
    inputs_vd = transformer.model.get_input_embeddings().weight.detach()
    rows_cd = directions(6)
    before, _ = nearest_tokens(transformer, rows_cd, "layers.1", K)
    for tokens, row_d in zip(before, rows_cd, strict=True):
        scaled_d = row_d / row_d.square().mean().sqrt() * norm.weight
        assert tokens == by_sorting(transformer.tokenizer, inputs_vd, scaled_d)
    assert before != nearest_tokens(transformer, rows_cd, LAST, K)[0]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_of_its_own_is_read_from_the_checkpoint(random_model, tmp_path, sharded):
    folder = tmp_path / "untied"
    shutil.copytree(random_model, folder)
    weights = load_file(folder / "model.safetensors")
    inputs_vd = next(w for name, w in weights.items() if name.endswith("embed_tokens.weight"))
    head_vd = torch.randn(inputs_vd.shape, generator=torch.Generator().manual_seed(2))
    save_file({"lm_head.weight": head_vd}, folder / "head.safetensors")
    if sharded:
        (folder / "model.safetensors").rename(folder / "body.safetensors")
        files = dict.fromkeys(weights, "body.safetensors")
        index = {"metadata": {}, "weight_map": files | {"lm_head.weight": "head.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        both = weights | {"lm_head.weight": head_vd}
        save_file(both, folder / "model.safetensors", {"format": "pt"})
    transformer = load_backbone(str(folder))
    rows_cd = directions(6)
    found, source = nearest_tokens(transformer, rows_cd, LAST, K)
    assert source == "output embeddings, from the checkpoint"
    for tokens, row_d in zip(found, rows_cd, strict=True):
        assert tokens == by_sorting(transformer.tokenizer, head_vd, row_d)
