"""`build` from end to end on a small model of every family."""

from __future__ import annotations

import json
import sys

import pytest

from conftest import SMALL_SAE
from families import FAMILIES, parameter
from patch_retriever import PatchedRetriever, build_retriever
from patch_retriever.items import Item
from patch_retriever.patch.deep import CODE
from patch_retriever.pictures.picture import PictureFile


@pytest.fixture
def golden_python(fresh_python, monkeypatch):
    """The golden check runs in a fresh process, too."""
    monkeypatch.setattr(sys, "executable", str(fresh_python))


@pytest.mark.usefixtures("golden_python")
def test_build_in_half_precision_where_that_takes_code(stand_in, photo_folder, tmp_path):
    folder = tmp_path / "out"
    build_retriever(
        folder,
        model=str(stand_in("chameleon")),
        pairs=str(photo_folder),
        sae=SMALL_SAE,
        preset="paper",
        dtype="bfloat16",
    )
    assert (folder / CODE.name).is_file()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("golden_python")
@pytest.mark.parametrize("name", [parameter(name) for name in FAMILIES])
def test_build(name, stand_in, photo_folder, tmp_path, fresh):
    result = build_retriever(
        tmp_path / "out", model=str(stand_in(name)), pairs=str(photo_folder), sae=SMALL_SAE
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
