"""The live model: base and patched call by call, and equal to what is exported."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from handmade import (
    INPUTS,
    ITEMS,
    KINDS_N,
    PATCHES,
    READOUTS,
    TEXTS,
    WIDTH,
    C,
    Drawn,
    live,
    make_patches,
)
from patch_retriever import PatchedRetriever
from patch_retriever.activations.collect import collect_features
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.export import export_modules
from patch_retriever.sae.formats import load_sae

RAW_INPUTS = {
    "text": list(TEXTS),
    "image": [Drawn(i).open() for i in range(3)],
    "both": [{"text": text, "image": Drawn(i).open()} for i, text in enumerate(TEXTS)],
    "both, the other order": [{"image": Drawn(i).open(), "text": t} for i, t in enumerate(TEXTS)],
    "mixed": ["a cat", Drawn(1).open(), {"text": "no", "image": Drawn(2).open()}, "two cats", "no"],
}


@pytest.fixture(scope="module")
def model_folder(random_model):
    return str(random_model)


@pytest.fixture(scope="module", params=READOUTS, ids=lambda readout: readout.name)
def made(request, model_folder):
    """A readout, the features of the items under it, and patches made by hand for it."""
    readout = request.param
    _, features, patches = make_patches(model_folder, readout)
    return readout, features, patches


def encode_as(model, role, inputs=INPUTS, **options):
    encode = model.encode_query if role == QUERY else model.encode_document
    return encode(inputs, convert_to_tensor=True, **options)


def largest_difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", ["subtract", "everything"])
def test_without_the_patch_it_is_the_plain_backbone_bit_for_bit(name, made, model_folder):
    readout, _, patches = made
    plain = with_readout(load_backbone(model_folder), readout)
    retriever = live(model_folder, readout, patches[name])
    retriever.encode(INPUTS)
    assert np.array_equal(retriever.encode(INPUTS, patch=False), plain.encode(INPUTS))


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("role", [QUERY, DOCUMENT], ids=["query", "document"])
def test_with_the_patch_it_is_the_patch_on_features(name, role, made, model_folder):
    readout, features, patches = made
    found_ne = encode_as(live(model_folder, readout, patches[name]), role)
    assert largest_difference(found_ne, patches[name].embed(features, role)) <= 1e-5


def test_every_patch_here_changes_embeddings(made):
    _, features, patches = made
    base_nd = patches["nothing"].embed(features, QUERY)
    for name in set(PATCHES) - {"nothing"}:
        assert largest_difference(patches[name].embed(features, QUERY), base_nd) > 0.01, name


def test_the_batch_size_does_not_change_embeddings(made, model_folder):
    readout, _, patches = made
    retriever = live(model_folder, readout, patches["everything"])
    one, many = (retriever.encode(INPUTS, batch_size=b, convert_to_tensor=True) for b in (1, 64))
    assert largest_difference(one, many) <= 1e-5


def test_embeddings_have_length_one(made, model_folder):
    readout, _, patches = made
    embedded = live(model_folder, readout, patches["everything"]).encode(INPUTS)
    assert np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)


def test_roles_differ_where_statistics_are_per_role(made, model_folder):
    readout, _, patches = made
    retriever = live(model_folder, readout, patches["by role"])
    query, document = (encode_as(retriever, role) for role in (QUERY, DOCUMENT))
    assert largest_difference(query, document) > 0.01
    assert torch.equal(retriever.encode(INPUTS, task="query", convert_to_tensor=True), query)
    assert torch.equal(retriever.encode(INPUTS, convert_to_tensor=True), document)


def test_roles_are_alike_where_no_statistics_are_per_role(made, model_folder):
    readout, _, patches = made
    retriever = live(model_folder, readout, patches["by modality"])
    assert torch.equal(*(encode_as(retriever, role) for role in (QUERY, DOCUMENT)))


@pytest.mark.parametrize("role", [QUERY, DOCUMENT], ids=["query", "document"])
@pytest.mark.parametrize("name", PATCHES)
def test_in_bfloat16_live_and_exported_agree_as_far_as_it_goes(name, role, made, model_folder):
    # live, patches stay float32; exported, sentence-transformers casts Dense to the backbone's
    readout, _, patches = made
    backbone = with_readout(load_backbone(model_folder, "bfloat16"), readout)
    modules = [backbone[0], *export_modules(patches[name], WIDTH, readout.pooling)]
    exported = SentenceTransformer(modules=modules, device="cpu")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    found_ne = encode_as(PatchedRetriever(backbone, patches[name]), role)
    exported_ne = encode_as(exported, role).float()
    full_ne = encode_as(live(model_folder, readout, patches[name]), role)
    assert found_ne.dtype == torch.float32
    assert largest_difference(found_ne, exported_ne) < 0.02
    assert torch.cosine_similarity(found_ne, exported_ne).min() > 0.999
    assert torch.cosine_similarity(found_ne, full_ne).min() > 0.99
    if name != "nothing":  # and the patch is there, not lost in rounding
        base_ne = encode_as(PatchedRetriever(backbone, patches["nothing"]), role)
        assert largest_difference(found_ne, base_ne) > 0.01


@pytest.mark.parametrize("name", ["subtract", "everything"])
def test_keeping_every_concept_is_subtracting_none(name, made, model_folder):
    readout, _, patches = made
    kept = live(model_folder, readout, patches[name])
    without = live(model_folder, readout, replace(patches[name], subtract=None))
    for role in (QUERY, DOCUMENT):
        found_ne = encode_as(kept, role, keep_concepts=range(C))
        assert torch.equal(found_ne, encode_as(without, role))


def test_keeping_some_concepts_is_subtracting_the_others(made, model_folder):
    readout, features, patches = made
    subtract = patches["everything"].subtract
    keep = subtract.concepts_m[::2].tolist()
    strength_m = subtract.strength_m.clone()
    strength_m[::2] = 0
    others = replace(patches["everything"], subtract=replace(subtract, strength_m=strength_m))
    retriever = live(model_folder, readout, patches["everything"])
    found_ne = retriever.encode(INPUTS, keep_concepts=keep, convert_to_tensor=True)
    assert largest_difference(found_ne, others.embed(features, DOCUMENT)) <= 1e-5
    assert largest_difference(found_ne, retriever.encode(INPUTS, convert_to_tensor=True)) > 1e-3


def test_switches_last_for_one_call(made, model_folder):
    readout, _, patches = made
    retriever = live(model_folder, readout, patches["everything"])
    before = retriever.encode(INPUTS)
    retriever.encode(INPUTS, patch=False)
    retriever.encode(INPUTS, keep_concepts=range(C))
    assert np.array_equal(retriever.encode(INPUTS), before)


def test_an_unknown_switch_is_refused(made, model_folder):
    readout, _, patches = made
    with pytest.raises(ValueError, match="no_such_switch"):
        live(model_folder, readout, patches["nothing"]).encode(["a cat"], no_such_switch=True)


def write_export(folder, model_folder, readout, patch):
    """The files that a build exports, without its report."""
    transformer = with_readout(load_backbone(model_folder), readout)[0]
    modules = [transformer, *export_modules(patch, WIDTH, readout.pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    patch.save(folder / "patch")
    return folder


def assert_export_equals_live(folder):
    exported = SentenceTransformer(str(folder), device="cpu")
    retriever = PatchedRetriever.from_folder(folder)
    for kind, inputs in RAW_INPUTS.items():
        for role in (QUERY, DOCUMENT):
            found, expected = (encode_as(m, role, inputs) for m in (exported, retriever))
            assert largest_difference(found, expected) <= 1e-5, (kind, role)
    inputs = RAW_INPUTS["mixed"]
    found, expected = (m.encode(inputs, convert_to_tensor=True) for m in (exported, retriever))
    assert largest_difference(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["subtract", "by role", "everything"])
def test_an_exported_folder_equals_the_live_model(name, made, model_folder, tmp_path):
    readout, _, patches = made
    assert_export_equals_live(write_export(tmp_path, model_folder, readout, patches[name]))


def test_an_exported_folder_equals_the_patch_on_features(made, model_folder, tmp_path):
    readout, features, patches = made
    write_export(tmp_path, model_folder, readout, patches["everything"])
    exported = SentenceTransformer(str(tmp_path), device="cpu")
    for role in (QUERY, DOCUMENT):
        expected_ne = patches["everything"].embed(features, role)
        assert largest_difference(encode_as(exported, role), expected_ne) <= 1e-5


def test_an_exported_folder_needs_no_module_of_ours(made, model_folder, tmp_path):
    readout, _, patches = made
    write_export(tmp_path, model_folder, readout, patches["everything"])
    types = [module["type"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in types)
    assert not list(tmp_path.rglob("*.py"))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_live_twin_of_a_folder_has_the_backbone_of_the_folder(made, model_folder, tmp_path):
    readout, _, patches = made
    write_export(tmp_path, model_folder, readout, patches["everything"])
    plain = with_readout(load_backbone(model_folder), readout)
    retriever = PatchedRetriever.from_folder(str(tmp_path))
    assert np.array_equal(retriever.encode(INPUTS, patch=False), plain.encode(INPUTS))


def test_a_finished_build_equals_its_live_twin(finished_build):
    assert_export_equals_live(finished_build)


def test_the_live_twin_of_a_build_equals_its_patch_on_features(finished_build, model_folder):
    patch = Patch.load(finished_build / "patch")
    readout = Readout.from_json(patch.about["readout"])
    sae = load_sae(finished_build / "run" / "sae")
    features = collect_features(load_backbone(model_folder), ITEMS, readout, sae, KINDS_N)
    retriever = PatchedRetriever.from_folder(finished_build)
    for role in (QUERY, DOCUMENT):
        found_ne = encode_as(retriever, role)
        assert largest_difference(found_ne, patch.embed(features, role)) <= 1e-5


def test_the_base_of_a_build_is_the_model_it_was_made_of(finished_build, model_folder):
    retriever = PatchedRetriever.from_folder(finished_build)
    readout = Readout.from_json(retriever.patch.about["readout"])
    plain = with_readout(load_backbone(model_folder), readout)
    assert np.array_equal(retriever.encode(INPUTS, patch=False), plain.encode(INPUTS))


def test_a_folder_without_a_patch_is_refused(random_model):
    with pytest.raises(UserError, match="no patch"):
        PatchedRetriever.from_folder(random_model)


def test_a_folder_whose_patch_names_no_readout_is_refused(tmp_path):
    Patch(LAST).save(tmp_path / "patch")
    with pytest.raises(UserError, match="readout"):
        PatchedRetriever.from_folder(tmp_path)
