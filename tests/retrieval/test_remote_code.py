"""Models whose folder holds code: ours is known by its bytes, others' runs only where trusted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from commands import error_line, invoke
from handmade import ITEMS, C, make_patches, make_sae, normal
from patch_retriever import export_patch
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import ONE_WORD, Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.patch.operators import Subtract
from patch_retriever.retrieval.load import load_encoder

READOUT = Readout(ONE_WORD, pooling="lasttoken")
CODE = "patched_transformer.py"


@pytest.fixture(scope="module")
def exported(random_model, tmp_path_factory):
    """A patch at a layer, with statistics per role and modality."""
    folder = tmp_path_factory.mktemp("deep") / "deep"
    _, _, patches = make_patches(str(random_model), READOUT)
    subtract = Subtract.from_sae(make_sae(0.05, seed=1), normal(C, seed=41).clamp(0, 1))
    patch = replace(patches["everything"], layers={"layers.1": subtract})
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(load_backbone(str(random_model)), READOUT, patch, folder, ITEMS[::4])
    return folder


@pytest.fixture
def changed(exported, tmp_path):
    """The same with another line of code, which leaves a mark where it is run."""
    folder = Path(shutil.copytree(exported, tmp_path / "changed"))
    code = (folder / CODE).read_text()
    mark = tmp_path / "ran"
    first = "from __future__ import annotations\n"
    marking = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (folder / CODE).write_text(code.replace(first, first + marking, 1))
    return folder, mark


@pytest.mark.parametrize("role", ["query", "document"])
def test_vectors_are_what_sentence_transformers_gives(exported, role):
    model = SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
    expected = getattr(model, f"encode_{role}")([item.load() for item in ITEMS])
    np.testing.assert_allclose(load_encoder(str(exported)).embed(ITEMS, role), expected, atol=1e-6)


def test_its_base_is_the_model_it_was_made_of(exported, random_model):
    base = load_encoder(f"{exported}@base")
    expected = with_readout(load_backbone(str(random_model)), READOUT).encode(
        [item.load() for item in ITEMS]
    )
    np.testing.assert_allclose(base.embed(ITEMS, "query"), expected, atol=1e-6)
    assert base.trunk_fingerprint != load_encoder(str(exported)).trunk_fingerprint


def test_the_fingerprint_sees_what_is_subtracted(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    encoder = load_encoder(str(exported))
    assert load_encoder(str(folder)).trunk_fingerprint == encoder.trunk_fingerprint
    path = folder / "patched_transformer.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "1.strength_m": tensors["1.strength_m"] / 2}, path)
    assert load_encoder(str(folder)).trunk_fingerprint != encoder.trunk_fingerprint


def test_changed_code_does_not_run_unless_it_is_trusted(changed):
    folder, mark = changed
    with pytest.raises(UserError, match=r"patched_transformer\.py.*--trust-remote-code"):
        load_encoder(str(folder))
    assert not mark.exists()
    found = load_encoder(str(folder), trust_remote_code=True).embed(ITEMS[:2], "query")
    assert mark.exists()
    assert found.shape == (2, 32)


def test_unchanged_code_is_not_run_from_the_folder(exported, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("code of the folder was run")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", never)
    load_encoder(str(exported))


def test_a_class_of_another_file_is_not_ours(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "modeling_other.PatchedTransformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"modeling_other\.py"):
        load_encoder(str(folder))


def test_commands_take_such_a_folder(exported, changed, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"text": "a cat"}) + "\n")
    found, other = tmp_path / "found.npy", tmp_path / "other.npy"
    assert invoke("encode", exported, items, "-o", found).exit_code == 0
    expected = load_encoder(str(exported)).embed([Item("a cat")], "document")
    np.testing.assert_allclose(np.load(found), expected, atol=1e-6)
    foreign = ("encode", changed[0], items, "-o", other)
    assert "--trust-remote-code" in error_line(invoke(*foreign))
    assert invoke(*foreign, "--trust-remote-code").exit_code == 0
    np.testing.assert_allclose(np.load(other), expected, atol=1e-6)
