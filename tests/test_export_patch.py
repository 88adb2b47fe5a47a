"""Exports of patches at layers: live, exported and in a fresh process, patched and not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from handmade import INPUTS, ITEMS, READOUTS, WIDTH, C, make_patches, make_sae, normal
from patch_retriever import PatchedRetriever, export_patch
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, Readout
from patch_retriever.errors import UserError
from patch_retriever.golden import check_golden
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import Subtract

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
}
"""Prompt, site, pooling, the patch at the readout (see `handmade.PATCHES`), patched layers."""


def subtract_at(spread, seed, strength_c=None):
    strength_c = normal(C, seed=seed + 40).clamp(0, 1) if strength_c is None else strength_c
    return Subtract.from_sae(make_sae(spread, seed=seed), strength_c)


@pytest.fixture(scope="module")
def model_folder(random_model):
    return str(random_model)


@pytest.fixture(scope="module", params=DEEP)
def made(request, model_folder):
    """A readout, and a patch of layers for it."""
    prompt, site, pooling, name, layers = DEEP[request.param]
    readout = Readout(prompt, site, pooling)
    _, _, patches = make_patches(model_folder, readout)
    found = {layer: subtract_at(0.05, seed) for seed, layer in enumerate(layers)}
    return readout, replace(patches[name], layers=found)


@pytest.fixture(scope="module")
def exported(made, model_folder, tmp_path_factory):
    readout, patch = made
    folder = tmp_path_factory.mktemp("deep") / "a patched retriever"
    assert export_patch(load_backbone(model_folder), readout, patch, folder, GOLDEN) <= 1e-5
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


def test_a_changed_tensor_is_found_by_the_golden_check(exported, tmp_path):
    import shutil

    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    path = folder / "patched_transformer.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("W_dec_md"))
    save_file({**tensors, name: -tensors[name]}, path)
    with pytest.raises(UserError, match="differs from the live one"):
        check_golden(folder)
