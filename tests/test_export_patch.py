"""Exports of patches at layers: live, exported and in a fresh process, patched and not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from handmade import INPUTS, ITEMS, READOUTS, C, make_patches, make_sae, normal
from patch_retriever import PatchedRetriever, export_patch
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, Readout
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.deep import patched_modules
from patch_retriever.patch.export import export_modules
from patch_retriever.patch.operators import Subtract
from patch_retriever.probe import Probe

GOLDEN = (ITEMS[0], ITEMS[4], ITEMS[8])
LAST_LAYER = "layers.2"
DEEP = {
    "one layer": (PAPER, "last_hidden_state", "mean", "nothing", ("layers.1",)),
    "the last layer": (PAPER, "last_hidden_state", "mean", "nothing", (LAST_LAYER,)),
    "two layers": (ONE_WORD, "last_hidden_state", "lasttoken", "by role", ("layers.0", "layers.1")),
    "a layer and the readout": (PAPER, "last_hidden_state", "mean", "subtract", ("layers.0",)),
    "everything": (PAPER, "last_hidden_state", "mean", "everything", ("layers.0", LAST_LAYER)),
    "everything, last token": (ONE_WORD, LAST_LAYER, "lasttoken", "everything", ("layers.1",)),
    "read in the middle": (PAPER, "layers.1", "mean", "everything", ("layers.0",)),
    "scaled, at the readout": (PAPER, "last_hidden_state", "mean", "subtract", ()),
    "scaled, in the middle": (ONE_WORD, "layers.1", "lasttoken", "everything", ()),
    "scaled, everything": (PAPER, "last_hidden_state", "mean", "everything", ("layers.0",)),
}
"""Prompt, site, pooling, the patch at the readout (see `handmade.PATCHES`), patched layers. Those
that are scaled subtract by an SAE with a scale per token."""


def subtract_at(spread, seed, input_scale="none"):
    sae = make_sae(spread, seed=seed, input_scale=input_scale)
    return Subtract.from_sae(sae, normal(C, seed=seed + 40).clamp(0, 1))


@pytest.fixture(scope="module")
def model_folder(random_model):
    return str(random_model)


@pytest.fixture(scope="module", params=DEEP)
def made(request, model_folder):
    """A readout, and a patch of layers for it."""
    prompt, site, pooling, name, layers = DEEP[request.param]
    readout = Readout(prompt, site, pooling)
    scale = "token" if request.param.startswith("scaled") else "none"
    _, _, patches = make_patches(model_folder, readout, input_scale=scale)
    found = {layer: subtract_at(0.05, seed, scale) for seed, layer in enumerate(layers)}
    return readout, replace(patches[name], layers=found)


@pytest.fixture(scope="module")
def exported(made, model_folder, tmp_path_factory):
    """The folder of an export, not checked in a process of its own."""
    folder = tmp_path_factory.mktemp("deep") / "a patched retriever"
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(load_backbone(model_folder), *made, folder, GOLDEN)
    return folder


def embedded(model, role, **options):
    encode = model.encode_query if role == QUERY else model.encode_document
    return encode(INPUTS, convert_to_tensor=True, **options)


def largest_difference(a, b):
    return float((a - b).abs().max())


def test_exported_live_and_base_patched_and_not(made, exported, model_folder):
    readout, patch = made
    live = PatchedRetriever(with_readout(load_backbone(model_folder), readout), patch)
    loaded = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
    base = with_readout(load_backbone(model_folder), readout)
    for role in (QUERY, DOCUMENT):
        expected_ne = embedded(live, role)
        assert largest_difference(embedded(loaded, role), expected_ne) <= 1e-5
        base_ne = embedded(base, role)
        assert torch.equal(embedded(live, role, patch=False), base_ne)
        assert largest_difference(embedded(loaded, role, patch=False), base_ne) <= 1e-5
        assert largest_difference(expected_ne, base_ne) > 1e-2
        # a switch lasts for one call
        assert torch.equal(embedded(live, role), expected_ne)
        assert largest_difference(embedded(loaded, role), expected_ne) <= 1e-5


def test_every_layer_counts(made, model_folder):
    readout, patch = made
    backbone = with_readout(load_backbone(model_folder), readout)
    whole_ne = embedded(PatchedRetriever(backbone, patch), DOCUMENT)
    for layer in patch.layers:
        others = {k: v for k, v in patch.layers.items() if k != layer}
        retriever = PatchedRetriever(backbone, replace(patch, layers=others))
        assert largest_difference(embedded(retriever, DOCUMENT), whole_ne) > 1e-3, layer


def test_the_live_twin_of_a_folder(made, exported, model_folder):
    readout, patch = made
    twin = PatchedRetriever.from_folder(exported)
    live = PatchedRetriever(with_readout(load_backbone(model_folder), readout), patch)
    assert list(twin.patch.layers) == sorted(patch.layers)
    assert torch.equal(embedded(twin, QUERY), embedded(live, QUERY))


def test_keeping_concepts_of_layers(made, model_folder):
    readout, patch = made
    backbone = with_readout(load_backbone(model_folder), readout)
    none = {
        site: replace(subtract, strength_m=torch.zeros_like(subtract.strength_m))
        for site, subtract in patch.layers.items()
    }
    without = PatchedRetriever(backbone, replace(patch, layers=none, subtract=None))
    kept_ne = embedded(PatchedRetriever(backbone, patch), QUERY, keep_concepts=range(C))
    assert largest_difference(kept_ne, embedded(without, QUERY)) <= 1e-6


def test_it_is_saved_again_and_loads_again(exported, tmp_path):
    model = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
    expected_ne = embedded(model, QUERY)
    model.save(str(tmp_path / "again"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    assert torch.equal(embedded(again, QUERY), expected_ne)
    assert largest_difference(embedded(again, QUERY, patch=False), expected_ne) > 1e-2


def test_in_half_precision_the_patch_stays_in_float32(exported, tmp_path):
    half = {"model_kwargs": {"dtype": torch.bfloat16}}
    model = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True, **half)
    model.save(str(tmp_path / "half"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "half"), device="cpu", trust_remote_code=True)
    whole = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
    assert again.dtype == torch.bfloat16
    patch = {n: b for n, b in whole.named_buffers() if "subtractions" in n or "rkde" in n}
    assert patch
    kept = dict(again.half().named_buffers())
    assert all(torch.equal(kept[name], buffer) for name, buffer in patch.items())


def test_it_says_that_it_needs_the_flag(exported):
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(exported), device="cpu")
    assert "trust_remote_code=True" in (exported / "README.md").read_text()
    assert "trust_remote_code=True" in (exported / "golden" / "check.py").read_text()
    assert [p.name for p in exported.glob("*.py")] == ["patched_transformer.py"]
    assert "patch_retriever" not in (exported / "patched_transformer.py").read_text()
    types = [m["type"] for m in json.loads((exported / "modules.json").read_text())]
    own = {"patched_transformer.PatchedTransformer", "patched_transformer.PatchedMaps"}
    assert types[0] in own
    assert all(t in own or t.startswith("sentence_transformers.") for t in types)


@pytest.mark.usefixtures("golden_process")
@pytest.mark.parametrize("scale", ["none", "token"])
def test_in_a_fresh_process_without_this_package(scale, model_folder, tmp_path):
    """Readout before the final norm, per-modality and per-role maps"""
    readout = Readout(ONE_WORD, LAST_LAYER, "lasttoken")
    patch = replace(
        make_patches(model_folder, readout, input_scale=scale)[2]["everything"],
        layers={"layers.1": subtract_at(0.05, 1, scale)},
    )
    transformer = load_backbone(model_folder)
    Probe(transformer)  # nnsight wraps it for good
    assert 0 <= export_patch(transformer, readout, patch, tmp_path, GOLDEN) <= 1e-5
    # of the live model, with its patch and without
    embeddings = load_file(tmp_path / "golden" / "embeddings.safetensors")
    assert set(embeddings) == {"query", "document", "one_by_one", "unpatched"}
    assert largest_difference(embeddings["document"], embeddings["unpatched"]) > 1e-2


def test_many_threads_encode_with_one_model(exported):
    model = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
    expected = {patch: model.encode(INPUTS, patch=patch) for patch in (True, False)}
    switches = [bool(i % 2) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda patch: model.encode(INPUTS, patch=patch), switches))
    for patch, embeddings in zip(switches, found, strict=True):
        assert np.array_equal(embeddings, expected[patch])


def test_no_layer_after_the_readout_runs(model_folder):
    readout = Readout(PAPER, "layers.1")
    patch = Patch("layers.1", layers={"layers.0": subtract_at(0.05, 0)})
    transformer = with_readout(load_backbone(model_folder), readout)[0]
    model = SentenceTransformer(modules=patched_modules(transformer, patch, "mean"), device="cpu")
    decoder = transformer.model.language_model
    ran = []
    for name, module in (*decoder.layers.named_children(), ("norm", decoder.norm)):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.encode(["a cat"])
    assert ran == ["0"]  # this hook comes after ours on layer 1, which ends the pass


def test_in_bfloat16_live_and_exported_agree_as_far_as_it_goes(made, model_folder):
    readout, patch = made
    backbone = with_readout(
        load_backbone(model_folder, "bfloat16"), readout
    )  # probed, then exported
    live_ne = embedded(PatchedRetriever(backbone, patch), DOCUMENT)
    modules = patched_modules(backbone[0], patch, readout.pooling)
    exported = SentenceTransformer(modules=modules, device="cpu")
    found_ne = embedded(exported, DOCUMENT).float()
    assert torch.cosine_similarity(live_ne, found_ne).min() > 0.999
    base_ne = embedded(exported, DOCUMENT, patch=False).float()
    assert largest_difference(base_ne, found_ne) > 0.01


@pytest.mark.parametrize("layer", ["layers.3", "layers.99"])
def test_a_layer_that_is_not_there_is_refused(layer, model_folder):
    backbone = with_readout(load_backbone(model_folder), READOUTS[0])
    patch = Patch("last_hidden_state", layers={layer: subtract_at(0.05, 0)})
    with pytest.raises(UserError, match=f"a patch at {layer}, but .* layers.0 to layers.2"):
        PatchedRetriever(backbone, patch)


def test_a_patch_of_another_readout_is_refused(model_folder):
    backbone = with_readout(load_backbone(model_folder), READOUTS[0])
    with pytest.raises(UserError, match=r"a patch at layers\.1, but .* read at last_hidden_state"):
        PatchedRetriever(backbone, Patch("layers.1"))


@pytest.mark.parametrize("layer", ["layers.1", "layers.2", "pooled", "layers.x"])
def test_a_layer_that_is_not_before_the_readout_is_refused(layer):
    with pytest.raises(ValueError, match=layer):
        Patch("layers.1", layers={layer: subtract_at(0.05, 0)})


def test_a_similarity_of_a_patched_layer_is_not_explained(model_folder):
    backbone = with_readout(load_backbone(model_folder), READOUTS[0])
    patch = Patch("last_hidden_state", layers={"layers.1": subtract_at(0.05, 0)})
    with pytest.raises(UserError, match=r"felt by all layers after layers\.1"):
        PatchedRetriever(backbone, patch, make_sae(0.05)).explain("a cat", "a dog")


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_readout_before_the_final_norm_needs_no_code(pooling, model_folder, tmp_path):
    readout = Readout(PAPER, LAST_LAYER, pooling)
    _, features, patches = make_patches(model_folder, readout)
    transformer = load_backbone(model_folder)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(transformer, readout, patches["everything"], tmp_path, GOLDEN)
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert config["requirements"]["transformers"]["specifier"] == ">=5.23"
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    for role in (QUERY, DOCUMENT):
        expected_ne = patches["everything"].embed(features, role)
        assert largest_difference(embedded(loaded, role), expected_ne) <= 1e-5
    # of a mean, the final norm changes more than the length
    after = with_readout(load_backbone(model_folder), Readout(PAPER))
    before = with_readout(load_backbone(model_folder), Readout(PAPER, LAST_LAYER))
    assert largest_difference(embedded(after, QUERY), embedded(before, QUERY)) > 1e-3


def test_stock_modules_refuse_a_scale_per_token():
    patch = Patch("last_hidden_state", subtract_at(0.05, 0, "token"))
    with pytest.raises(ValueError, match="needs code"):
        export_modules(patch, 32, "mean")


def test_exports_without_a_scale_per_token_hold_what_they_always_held(exported, made):
    _, patch = made
    scaled = any(s.input_scale == "token" for s in patch.subtractions.values())
    tensors = load_file(exported / "patched_transformer.safetensors")
    assert any(name.endswith("epsilon") for name in tensors) == scaled


def on_disk(transformer):
    """All on the CPU but the decoder layers, which are read from the disk as they are run."""
    found = {name: "cpu" for name, _ in transformer.model.named_children()}
    del found["language_model"]
    inside = transformer.model.language_model.named_children()
    found |= {f"language_model.{name}": "cpu" for name, _ in inside}
    return {**found, "language_model.layers": "disk"}


def test_a_model_that_is_placed_by_a_device_map(made, model_folder):
    readout, patch = made
    plain = with_readout(load_backbone(model_folder), readout)
    expected_ne = embedded(PatchedRetriever(plain, patch), QUERY)
    device_map = on_disk(plain[0])
    placed = with_readout(load_backbone(model_folder, device_map=device_map), readout)
    modules = patched_modules(placed[0], patch, readout.pooling)
    for model in (PatchedRetriever(placed, patch), SentenceTransformer(modules=modules)):
        assert largest_difference(embedded(model, QUERY), expected_ne) <= 1e-5


def test_a_patch_goes_where_the_activations_are():
    subtract = subtract_at(0.05, 0)
    assert subtract.to(torch.device("cpu")) is subtract
    moved = subtract.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert subtract_at(0.05, 0, "token").to(torch.device("meta")).input_scale == "token"
    h_ntd = torch.empty(2, 3, 32, device="meta", dtype=torch.bfloat16)
    patched = subtract.on_stream(h_ntd)
    assert (patched.device.type, patched.dtype, patched.shape) == ("meta", h_ntd.dtype, h_ntd.shape)


def test_codes_just_at_their_thresholds_fire_in_both_or_in_neither(model_folder, tmp_path):
    """Thresholds are pre-activations that the live model has itself: rounding decides every one."""
    readout = READOUTS[1]
    backbone = with_readout(load_backbone(model_folder), readout)
    encoded = backbone.encode(INPUTS[:1], output_value=None)[0]
    sae = make_sae(1.0)
    u_tc = encoded["token_embeddings"].float().cpu() @ sae.W_enc_dc
    at_c = u_tc[-1].abs()
    sae.W_enc_dc *= u_tc[-1].sign()
    sae.threshold_c.copy_(at_c)
    patch = Patch(readout.site, Subtract.from_sae(sae, torch.ones(C)))
    live = PatchedRetriever(backbone, patch)
    export_patch(backbone[0], readout, patch, tmp_path, ITEMS)
    exported = SentenceTransformer(str(tmp_path), device="cpu")
    found, expected = (m.encode(INPUTS[:1], convert_to_tensor=True) for m in (exported, live))
    assert float((found - expected).abs().max()) <= 1e-6
