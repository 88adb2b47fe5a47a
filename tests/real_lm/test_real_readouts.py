"""Readouts of a real language model: cut decoders and two parts, live and exported."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

from handmade import C, make_map, make_sae, normal
from patch_retriever.activations.collect import collect_pooled
from patch_retriever.activations.inspection import handful
from patch_retriever.backbones.cut import cut_at
from patch_retriever.backbones.families import final_norm_path, n_layers
from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.data import all_items
from patch_retriever.export import export_patch
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.probe import Probe
from patch_retriever.retriever import PatchedRetriever

ITEMS = handful(all_items("scenes"))[::3]
CHATS = [item.load() for item in ITEMS]
CUTS = ("layers.13", "layers.29.attention")


@pytest.fixture(scope="module", params=["real_llava", "real_idefics3"])
def model(request):
    return load_backbone(str(request.getfixturevalue(request.param)))


@pytest.mark.parametrize("cut", CUTS)
def test_the_final_norm_of_the_stream_is_what_a_cut_decoder_gives(model, cut):
    set_readout(model, Readout(ONE_WORD))
    features = model.preprocess(CHATS)
    ended = cut_at(model, cut)
    with torch.no_grad():
        found = ended(dict(features))["token_embeddings"]
        stream = Probe(model).read(features, [cut])[cut]
        expected = model.model.get_submodule(final_norm_path(model.model))(stream)
    assert torch.equal(found, expected)


def test_the_final_norm_takes_the_sinks_out_of_a_mean(model):
    """As it is the first token is most of the mean of the stream; after the norm it is one of
    many."""
    readouts = [Readout(ONE_WORD, "layers.13"), Readout(ONE_WORD, cut="layers.13")]
    found = collect_pooled(model, ITEMS, readouts)
    raw_nd, normed_nd = (torch.nn.functional.normalize(found[r], dim=1) for r in readouts)
    raw, normed = (1 - float((unit_nd @ unit_nd.T).min()) for unit_nd in (raw_nd, normed_nd))
    assert raw < 0.05, (raw, normed)  # all items alike
    assert normed > 3 * raw, (raw, normed)


@pytest.mark.parametrize("cut", CUTS)
def test_live_equals_exported(model, tmp_path, cut):
    readout = Readout(ONE_WORD, LAST, "mean+lasttoken", cut=cut)
    width = model.get_embedding_dimension()
    subtract = Subtract.from_sae(make_sae(1.0, width), normal(C, seed=5).clamp(0, 1))
    patch = Patch(LAST, subtract, (make_map("all", 1.0, 3, 2 * width),))
    live = PatchedRetriever(with_readout(model, readout), patch)
    expected = live.encode(CHATS, convert_to_tensor=True)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(model, readout, patch, tmp_path, ITEMS)
    exported = SentenceTransformer(str(tmp_path), device="cpu")
    assert n_layers(exported[0].model) == int(cut.split(".")[1]) + 1
    found = exported.encode(CHATS, convert_to_tensor=True)
    assert float((found - expected).abs().max()) <= 1e-5
