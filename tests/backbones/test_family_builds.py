"""`build` from end to end on a small model of every family."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from transformers import PreTrainedModel

from conftest import SMALL_SAE
from families import FAMILIES, parameter
from patch_retriever import PatchedRetriever, build_retriever
from patch_retriever.backbones.load import load_backbone
from patch_retriever.items import Item
from patch_retriever.patch.deep import CODE
from patch_retriever.pictures.picture import PictureFile


@pytest.fixture
def golden_python(fresh_python, monkeypatch):
    """Processes that a build starts do not know this package."""
    monkeypatch.setattr(sys, "executable", str(fresh_python))


@pytest.mark.usefixtures("golden_process", "golden_python")
def test_build_in_the_dtype_of_its_files_where_that_takes_code(
    stand_in, photo_folder, tmp_path, monkeypatch
):
    """Of half precision; the model is loaded once."""
    folder = shutil.copytree(stand_in("chameleon"), tmp_path / "half")
    load_backbone(str(folder), dtype="bfloat16").model.save_pretrained(folder)
    loaded = []
    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return original.__get__(None, cls)(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    settings = {"model": str(folder), "pairs": str(photo_folder), "sae": SMALL_SAE, "folds": 1}
    out = tmp_path / "out"
    build_retriever(out, dtype="auto", preset="paper", **settings)
    assert loaded == ["ChameleonModel"]
    assert (out / CODE.name).is_file()
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    golden = json.loads((out / "golden" / "result.json").read_text())
    assert golden["max_abs_diff"] <= 1e-2  # rounding of what it gives; the maps keep float32
    exported = load_backbone(str(out), dtype="auto")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    again = []
    build_retriever(out, dtype="bfloat16", preset="paper", say=again.append, **settings)
    assert again
    assert all("done before" in line or line.startswith("readout: ") for line in again)


@pytest.mark.usefixtures("golden_process", "golden_python")
@pytest.mark.parametrize("name", [parameter(name) for name in FAMILIES])
def test_build(name, stand_in, photo_folder, tmp_path, fresh):
    result = build_retriever(
        tmp_path / "out",
        model=str(stand_in(name)),
        pairs=str(photo_folder),
        sae=SMALL_SAE,
        folds=5 if name == "llava" else 1,  # one is cross-validated, as all are for users
    )
    golden = json.loads((result.folder / "golden" / "result.json").read_text())
    assert golden["max_abs_diff"] <= 1e-5
    card = (result.folder / "README.md").read_text()
    assert f"differ by up to {golden['max_abs_diff_by_batch']:.1g}." in card
    photo = PictureFile(photo_folder / "7.png")
    items = [Item("a red field"), Item(picture=photo), Item("a green field", photo)]
    found = fresh().encode(result.folder, {"new": items})
    live = PatchedRetriever.from_folder(result.folder)
    loaded = [item.load() for item in items]
    for role, encode in (("query", live.encode_query), ("document", live.encode_document)):
        expected_nd = encode(loaded, convert_to_tensor=True)
        assert float((found[f"new {role}"] - expected_nd).abs().max()) <= 1e-5
