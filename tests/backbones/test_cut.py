"""Decoders that end early, of every family: what they give, what they run, what they export."""

from __future__ import annotations

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer

from families import FAMILIES, parameter
from handmade import C, make_map, make_sae, normal
from patch_retriever.activations.collect import collect_pooled
from patch_retriever.backbones.cut import can_skip_mlp, cut_at, stream_is_whole
from patch_retriever.backbones.families import (
    final_norm_path,
    image_token_id,
    layers_path,
    n_layers,
)
from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, PAPER, PLAIN, Readout
from patch_retriever.errors import UserError
from patch_retriever.export import export_patch
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.probe import Probe
from patch_retriever.retriever import PatchedRetriever
from pictured import MIXED

CHATS = [item.load() for item in MIXED]
CUTS = ("layers.0", "layers.1", "layers.1.attention", "layers.2.attention")


@pytest.fixture(scope="module", params=[parameter(n) for n in FAMILIES])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def transformer(stand_in, name):
    return load_backbone(str(stand_in(name)))


def tokens(transformer, features):
    with torch.no_grad():
        return transformer(dict(features))["token_embeddings"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_decoder_gives_the_normed_stream_and_runs_no_more(stand_in, name, transformer, cut):
    set_readout(transformer, Readout(PLAIN))
    features = transformer.preprocess(CHATS)
    probed = load_backbone(str(stand_in(name)))
    set_readout(probed, Readout(PLAIN))
    stream = Probe(probed).read(features, [cut])[cut]
    with torch.no_grad():
        expected = probed.model.get_submodule(final_norm_path(probed.model))(stream)
    whole = tokens(transformer, features)
    before = transformer.model.config.to_dict()
    ended = cut_at(transformer, cut)
    ran = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(transformer.model.get_submodule(layers_path(transformer.model)))
    ]
    found = tokens(ended, features)
    for handle in handles:
        handle.remove()
    whole_nt = torch.ones_like(features["input_ids"], dtype=torch.bool)
    if not stream_is_whole(transformer.model, cut):  # image features are added after it
        whole_nt = features["input_ids"] != image_token_id(transformer.config)
        assert not torch.equal(found, expected)
    assert torch.equal(found[whole_nt], expected[whole_nt])
    number = int(cut.split(".")[1])
    assert ran == list(range(number + 1))
    assert n_layers(ended.model) == number + 1
    # the original is what it was
    assert transformer.model.config.to_dict() == before
    assert torch.equal(tokens(transformer, features), whole)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_the_end_of_the_decoder_is_no_cut(transformer):
    assert cut_at(transformer, None) is transformer
    assert cut_at(transformer, f"layers.{n_layers(transformer.model) - 1}") is transformer


@pytest.mark.parametrize("cut", CUTS[1:3])
def test_cutting_twice_is_cutting_once(transformer, cut):
    once = cut_at(transformer, cut)
    assert cut_at(once, cut) is once


def test_a_layer_that_is_not_there_is_refused(transformer):
    with pytest.raises(UserError, match=r"layers.0 to layers.2"):
        cut_at(transformer, "layers.3")


@pytest.mark.parametrize("pooling", ["lasttoken", "mean+lasttoken"])
@pytest.mark.parametrize("cut", CUTS[1:3])
def test_live_equals_exported_equals_reloaded(stand_in, name, tmp_path, cut, pooling):
    readout = Readout(ONE_WORD, LAST, pooling, cut=cut)
    transformer = load_backbone(str(stand_in(name)))
    width = transformer.get_embedding_dimension()
    subtract = Subtract.from_sae(make_sae(0.3, width), normal(C, seed=5).clamp(0, 1))
    parts = len(pooling.split("+"))
    patch = Patch(LAST, subtract, (make_map("all", 1.0, 3, parts * width),))
    live = PatchedRetriever(with_readout(transformer, readout), patch)
    expected = live.encode(CHATS, convert_to_tensor=True)
    assert live.encode(CHATS[0], patch=False).shape == (parts * width,)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(transformer, readout, patch, tmp_path, MIXED)
    exported = SentenceTransformer(str(tmp_path), device="cpu")
    assert n_layers(exported[0].model) == int(cut.split(".")[1]) + 1
    again = PatchedRetriever.from_folder(tmp_path)
    for model in (exported, again):
        found = model.encode(CHATS, convert_to_tensor=True)
        assert float((found - expected).abs().max()) <= 1e-5
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_a_readout_at_a_layer_exports_no_layer_behind_it(stand_in, name, tmp_path):
    readout = Readout(PAPER, "layers.0")
    transformer = load_backbone(str(stand_in(name)))
    backbone = with_readout(transformer, readout)
    expected = backbone.encode(CHATS, convert_to_tensor=True)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(transformer, readout, Patch("layers.0"), tmp_path, MIXED)
    exported = SentenceTransformer(str(tmp_path), device="cpu")
    assert n_layers(exported[0].model) == 1
    found = exported.encode(CHATS, convert_to_tensor=True)
    assert float((found - expected).abs().max()) <= 1e-5


def test_one_pass_serves_every_cut_and_pooling(transformer, monkeypatch):
    """As each readout by itself, in plain sentence-transformers."""
    readouts = [
        Readout(ONE_WORD, LAST, pooling, cut=cut)
        for cut in (None, *CUTS)
        if stream_is_whole(transformer.model, cut)
        for pooling in ("mean", "lasttoken", "mean+lasttoken")
    ]
    passes, read = [], Probe.read
    monkeypatch.setattr(Probe, "read", lambda *a: passes.append(1) or read(*a))
    found = collect_pooled(transformer, MIXED, readouts, batch_size=4)
    assert len(passes) == 1
    for readout in readouts:
        backbone = with_readout(transformer, readout)
        expected = backbone.encode(CHATS, convert_to_tensor=True)
        unit_nd = torch.nn.functional.normalize(found[readout], dim=1)
        assert float((unit_nd - expected).abs().max()) <= 1e-5, readout.name


def test_a_model_that_was_probed_can_be_cut_and_probed_again(transformer):
    set_readout(transformer, Readout(PLAIN))
    features = transformer.preprocess(CHATS)
    Probe(transformer).read(features, ["layers.0"])
    ended = cut_at(transformer, "layers.1.attention")
    found = Probe(ended).read(features, ["layers.0", LAST])
    assert torch.equal(found[LAST], tokens(ended, features))
    whole = Probe(transformer).read(features, ["layers.0", LAST])
    assert torch.equal(found["layers.0"], whole["layers.0"])


def test_every_family_here_can_leave_its_last_mlp_out(transformer):
    assert can_skip_mlp(transformer.model)
