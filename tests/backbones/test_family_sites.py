"""Sites of every family: read, patched and exported as plain forward hooks have it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from families import FAMILIES, parameter
from handmade import C, make_sae, normal
from patch_retriever.backbones.families import final_norm_path, image_token_id, layers_path
from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import LAST, PAPER, PLAIN, Readout
from patch_retriever.export import export_patch
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.probe import Probe
from patch_retriever.retriever import PatchedRetriever
from pictured import MIXED

LAYERS = ("layers.0", "layers.1", "layers.2")


CHATS = [item.load() for item in MIXED]


@pytest.fixture(scope="module", params=[parameter(n) for n in FAMILIES])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def transformer(stand_in, name):
    """A model that nnsight never touches."""
    return load_backbone(str(stand_in(name)))


@pytest.fixture(scope="module")
def probed(stand_in, name):
    """A second copy, which nnsight wraps, and its probe."""
    transformer = load_backbone(str(stand_in(name)))
    return transformer, Probe(transformer)


@pytest.fixture
def features(transformer, probed):
    for one in (transformer, probed[0]):
        set_readout(one, Readout(PLAIN))
    return transformer.preprocess(CHATS)


def decoder_layers(transformer):
    return transformer.model.get_submodule(layers_path(transformer.model))


def tensor_of(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(transformer, edits):
    """`edits[site]` on the decoder layers, by plain forward hooks."""

    def editing(edit):
        def hook(_module, _inputs, output):
            edited = edit(tensor_of(output))
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    layers = decoder_layers(transformer)
    handles = [
        layers[int(site.removeprefix("layers."))].register_forward_hook(editing(edit))
        for site, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def subtract_at(seed):
    """Of a size that matters in these models."""
    return Subtract.from_sae(make_sae(0.3, seed=seed), normal(C, seed=seed + 1).clamp(0, 1))


def final(transformer, features):
    with torch.no_grad():
        return transformer(dict(features))["token_embeddings"]


@pytest.mark.parametrize("sites", [LAYERS[:1], LAYERS[1:2], LAYERS[::2]], ids=", ".join)
def test_live_edits_equal_plain_hooks_that_edit(transformer, probed, features, sites):
    edits = {site: subtract_at(seed) for seed, site in enumerate(sites)}
    with hooked(transformer, edits):
        expected = final(transformer, features)
    found = probed[1].read(features, [LAST], edits)[LAST]
    assert torch.equal(found, expected)
    assert not torch.allclose(found, final(transformer, features), atol=1e-2)


def test_a_site_is_read_after_an_edit_of_an_earlier_layer(transformer, probed, features):
    edit, kept = subtract_at(0), {}

    def keep(h_ntd):
        kept["after"] = h_ntd.clone()
        return h_ntd

    with hooked(transformer, {"layers.0": edit, "layers.1": keep}):
        final(transformer, features)
    found = probed[1].read(features, ["layers.0", "layers.1"], {"layers.0": edit})
    plain = probed[1].read(features, ["layers.0", "layers.1"])
    assert torch.equal(found["layers.0"], edit(plain["layers.0"]))
    assert torch.equal(found["layers.1"], kept["after"])
    assert not torch.allclose(found["layers.1"], plain["layers.1"], atol=1e-2)


@pytest.mark.parametrize("deepest", range(3))
def test_nothing_after_the_deepest_site_runs(stand_in, name, deepest):
    transformer = load_backbone(str(stand_in(name)))
    set_readout(transformer, Readout(PLAIN))
    ran = []
    modules = {f"layers.{i}": layer for i, layer in enumerate(decoder_layers(transformer))}
    modules["norm"] = transformer.model.get_submodule(final_norm_path(transformer.model))
    for site, module in modules.items():  # before it: the last site's own end is not reached
        module.register_forward_pre_hook(lambda *_, site=site: ran.append(site))
    Probe(transformer).read(transformer.preprocess(CHATS), LAYERS[: deepest + 1])
    assert ran == list(LAYERS[: deepest + 1])


def test_the_last_layer_is_before_the_final_norm_and_the_last_hidden_state_after(
    transformer, probed, features
):
    found = probed[1].read(features, ["layers.2", LAST])
    norm = transformer.model.get_submodule(final_norm_path(transformer.model))
    with torch.no_grad():
        assert torch.equal(norm(found["layers.2"]), found[LAST])
    assert not torch.allclose(found["layers.2"], found[LAST], atol=1e-2)
    # and so it is for a readout, which is what is exported
    set_readout(transformer, Readout(PLAIN, "layers.2"))
    assert torch.equal(final(transformer, features), found["layers.2"])


def test_layers_n_is_what_layer_n_gives_and_not_all_that_the_next_one_reads(
    name, transformer, probed, features
):
    """Qwen3-VL adds image features between its first layers: text tokens alone pass unchanged."""
    read = {}
    layer = decoder_layers(transformer)[1]
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: read.update(h=(args or (kwargs["hidden_states"],))[0].clone()),
        with_kwargs=True,
    )
    final(transformer, features)
    handle.remove()
    given = probed[1].read(features, ["layers.0"])["layers.0"]
    image_nt = features["input_ids"] == image_token_id(transformer.config)
    assert bool(image_nt.any())
    assert torch.equal(given[~image_nt], read["h"][~image_nt])
    assert torch.equal(given, read["h"]) == (name != "qwen3-vl")


READOUTS = (
    Readout(PAPER),
    Readout(PAPER, "layers.2"),
    Readout(PAPER, pooling="lasttoken"),
)


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.name)
def test_exported_equals_live_equals_hooks(stand_in, name, tmp_path, readout):
    patch = Patch(readout.site, layers={site: subtract_at(i) for i, site in enumerate(LAYERS[:2])})
    backbone = with_readout(load_backbone(str(stand_in(name))), readout)
    with hooked(backbone[0], patch.layers):
        expected = backbone.encode(CHATS, convert_to_tensor=True)
    base = backbone.encode(CHATS, convert_to_tensor=True)
    live = PatchedRetriever(backbone, patch)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(backbone[0], readout, patch, tmp_path, MIXED)
    exported = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    for model in (live, exported):
        found = model.encode(CHATS, convert_to_tensor=True)
        assert float((found - expected).abs().max()) <= 1e-5
        unpatched = model.encode(CHATS, convert_to_tensor=True, patch=False)
        assert float((unpatched - base).abs().max()) <= 1e-5
    assert float((expected - base).abs().max()) > 1e-2


def test_a_patch_before_the_final_norm_is_exported_without_code(stand_in, name, tmp_path):
    readout = Readout(PAPER, "layers.2")
    patch = Patch("layers.2", subtract_at(0))
    transformer = load_backbone(str(stand_in(name)))
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(transformer, readout, patch, tmp_path, MIXED)
    live = PatchedRetriever.from_folder(tmp_path)
    exported = SentenceTransformer(str(tmp_path), device="cpu")
    found, expected = (m.encode(CHATS, convert_to_tensor=True) for m in (exported, live))
    assert float((found - expected).abs().max()) <= 1e-5
    without = replace(patch, subtract=None)
    other = PatchedRetriever(with_readout(transformer, readout), without)
    assert float((other.encode(CHATS, convert_to_tensor=True) - expected).abs().max()) > 1e-2


def test_the_documents_table_says_so(name, transformer):
    """What `test_the_last_layer_is_before_...` shows, by name."""
    lines = (Path(__file__).parents[2] / "docs" / "sites.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {name} |"))
    paths = [f"`{path(transformer.model)}`" for path in (layers_path, final_norm_path)]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [name, *paths, "before", "after"]
