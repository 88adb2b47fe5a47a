"""The patch on disk: a round trip, and one clear line for what is no patch."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import GROUPS, Affine, Gate, Subtract
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

N, D, C, E = 12, 6, 10, 4
GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


SAE = SparseAutoencoder(rand(D, C), rand(C), rand(C, D), rand(D), rand(C).abs())
SUBTRACT = Subtract.from_sae(SAE, torch.tensor([0.0, 1, 0.5, 0, 0, 0.25, 0, 0, 1, 0]))
GATE = Gate(rand(2, D), rand(2), 0.75)
FEATURES = Features(
    rand(N, D), rand(N, D), Codes.from_dense(SAE.encode(rand(N, D))), torch.arange(N) % 3
)


def make_map(by, d=D, e=D):
    g = len(GROUPS[by])
    return Affine(f"map {by}", by, rand(g, d, e), rand(g, e))


ALL_BY = (make_map("role"), make_map("modality"), make_map("all", D, E))
BY_TOKEN = Subtract.from_sae(
    SparseAutoencoder(*SAE.state_dict().values(), input_scale="token"), torch.full((C,), 0.5)
)
PATCHES = {
    "nothing": Patch("last_hidden_state"),
    "subtract": Patch("layers.1", SUBTRACT),
    "a scale per token": Patch("layers.1", BY_TOKEN, layers={"layers.0": SUBTRACT}),
    "map": Patch("last_hidden_state", None, (make_map("all"),)),
    "role": Patch("last_hidden_state", SUBTRACT, (make_map("role"),)),
    "gate without use": Patch("last_hidden_state", None, (make_map("all"),), GATE),
    "everything": Patch("layers.0", SUBTRACT, ALL_BY, GATE, {"method": "é", "n": [1, {"a": 2}]}),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_loaded_patch_gives_the_same_embeddings(name, tmp_path):
    patch = PATCHES[name]
    patch.save(tmp_path)
    loaded = Patch.load(tmp_path)
    for role in (QUERY, DOCUMENT):
        assert torch.equal(loaded.embed(FEATURES, role), patch.embed(FEATURES, role))


@pytest.mark.parametrize("name", PATCHES)
def test_a_loaded_patch_is_the_same_patch(name, tmp_path):
    patch = PATCHES[name]
    patch.save(tmp_path)
    loaded = Patch.load(str(tmp_path))
    assert (loaded.site, loaded.about, loaded.gated) == (patch.site, patch.about, patch.gated)
    assert [(m.name, m.by) for m in loaded.maps] == [(m.name, m.by) for m in patch.maps]
    assert (loaded.gate is None) == (patch.gate is None)
    if patch.gate is not None:
        assert loaded.gate.margin == patch.gate.margin
    assert (loaded.subtract is None) == (patch.subtract is None)
    if patch.subtract is not None:
        assert torch.equal(loaded.subtract.concepts_m, patch.subtract.concepts_m)
    for site, subtract in patch.subtractions.items():
        h_nd = 3 * FEATURES.pooled_nd
        assert torch.equal(loaded.subtractions[site](h_nd), subtract(h_nd))


def test_patches_are_of_the_oldest_format_that_can_hold_them(tmp_path):
    layer = {"layers.0": SUBTRACT}
    for number, patch in enumerate(
        (PATCHES["everything"], Patch("layers.1", layers=layer), PATCHES["a scale per token"]), 1
    ):
        patch.save(tmp_path)
        values = json.loads((tmp_path / "patch.json").read_text())
        assert values["format"] == number
        scales = [o.get("input_scale") for o in values["operators"] if o["kind"] == "subtract"]
        assert scales == ([None, "token"] if number == 3 else [None])


def test_an_unknown_input_scale(tmp_path):
    PATCHES["a scale per token"].save(tmp_path)
    rewrite(tmp_path, operators=[{"kind": "subtract", "input_scale": "week"}])
    assert_unreadable(tmp_path, "input scale 'week'")


@pytest.mark.parametrize("name", PATCHES)
def test_both_roles_at_once_are_each_by_itself(name):
    both = PATCHES[name].embed_both(FEATURES)
    for role, found_ne in zip((QUERY, DOCUMENT), both, strict=True):
        assert torch.equal(found_ne, PATCHES[name].embed(FEATURES, role))


def test_embeddings_have_length_one_and_the_maps_width():
    embedded_ne = PATCHES["everything"].embed(FEATURES, QUERY)
    assert embedded_ne.shape == (N, E)
    assert torch.allclose(embedded_ne.norm(dim=1), torch.ones(N), atol=1e-6)


def test_roles_differ_only_where_a_map_is_by_role():
    by_role, plain = PATCHES["role"], PATCHES["subtract"]
    assert not torch.allclose(by_role.embed(FEATURES, QUERY), by_role.embed(FEATURES, DOCUMENT))
    assert torch.equal(plain.embed(FEATURES, QUERY), plain.embed(FEATURES, DOCUMENT))


def test_subtraction_comes_before_the_maps():
    step = make_map("all")
    patched_nd = SUBTRACT.on_pooled(FEATURES.pooled_nd, FEATURES.codes)
    expected_nd = patched_nd @ step.weight_gde[0] + step.bias_ge[0]
    expected_nd = expected_nd / expected_nd.norm(dim=1, keepdim=True)
    found_nd = Patch("last_hidden_state", SUBTRACT, (step,)).embed(FEATURES, QUERY)
    assert torch.allclose(found_nd, expected_nd, atol=1e-5)


def test_statistics_per_modality_need_a_gate():
    with pytest.raises(ValueError, match="gate"):
        Patch("last_hidden_state", None, (make_map("modality"),))


@pytest.mark.parametrize("name", PATCHES)
def test_nothing_but_json_and_safetensors_is_written(name, tmp_path):
    PATCHES[name].save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"patch.json", "patch.safetensors"}
    json.loads((tmp_path / "patch.json").read_text())
    load_file(tmp_path / "patch.safetensors")


@pytest.fixture
def saved(tmp_path):
    PATCHES["everything"].save(tmp_path)
    return tmp_path


def assert_unreadable(folder, match=None):
    with pytest.raises(UserError, match=match) as error:
        Patch.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder_and_no_patch_in_it(tmp_path):
    assert_unreadable(tmp_path / "nowhere", "no patch")
    (tmp_path / "config.json").write_text("{}")
    assert_unreadable(tmp_path, "no patch")


def test_truncated_tensors(saved):
    tensors = saved / "patch.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    assert_unreadable(saved, "damaged")


def test_missing_tensors_file(saved):
    (saved / "patch.safetensors").unlink()
    assert_unreadable(saved, "damaged")


@pytest.mark.parametrize("missing", ["subtract.strength_m", "map1.bias_ge", "gate.offset_2"])
def test_a_missing_tensor(saved, missing):
    path = saved / "patch.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != missing}, path)
    assert_unreadable(saved, "damaged")


def test_statistics_of_the_wrong_number_of_groups(saved):
    path = saved / "patch.safetensors"
    tensors = load_file(path)
    for name in ("map0.weight_gde", "map0.bias_ge"):
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path)
    assert_unreadable(saved, "damaged")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', '{"format": "1"}'])
def test_a_config_that_is_no_config(saved, text):
    (saved / "patch.json").write_text(text)
    assert_unreadable(saved, "damaged")


def rewrite(saved, **changes):
    values = json.loads((saved / "patch.json").read_text())
    (saved / "patch.json").write_text(json.dumps({**values, **changes}))


def test_a_newer_format_asks_for_an_upgrade(saved):
    rewrite(saved, format=4)
    assert_unreadable(saved, "newer")


@pytest.mark.parametrize("by", ["weather", None])
def test_a_map_by_something_unknown(saved, by):
    rewrite(saved, operators=[{"kind": "affine", "name": "x", "by": by}])
    assert_unreadable(saved, "damaged")


def test_a_config_that_lost_its_gate(saved):
    rewrite(saved, gate=None)
    assert_unreadable(saved, "damaged")


def test_an_operator_that_is_not_known(saved):
    rewrite(saved, operators=[{"kind": "rotate"}])
    assert_unreadable(saved)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_place_of_the_tensors_is_not_run(saved):
    crater = saved / "crater"
    (saved / "patch.safetensors").write_bytes(pickle.dumps(Bomb(crater)))
    assert_unreadable(saved, "damaged")
    assert not crater.exists()
