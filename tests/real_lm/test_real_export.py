"""Patches of a real language model: live, exported, and in a fresh process, they embed alike."""

from __future__ import annotations

import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer

from handmade import C, make_sae, normal
from patch_retriever import PatchedRetriever, export_patch
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.items import Item
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.scenes.tasks import ScenePicture
from patch_retriever.scenes.world import Thing, make_scene

WIDTH = 576
SCENES = [
    make_scene(Thing(4, "heart", "red", "large", "solid"), background="black"),
    make_scene(Thing(0, "moon", "blue", "small", "striped"), background="teal"),
]
ITEMS = (
    Item("a large solid red heart"),
    Item(picture=ScenePicture(SCENES[0])),
    Item("two small dogs on a mat, asleep", ScenePicture(SCENES[1])),
)
CHATS = [item.load() for item in ITEMS]
READOUT = Readout(ONE_WORD, pooling="lasttoken")


def subtract_at(spread):
    """Of concepts that fire, of a size that matters at a site of such a spread."""
    return Subtract.from_sae(make_sae(spread, WIDTH), normal(C, seed=2).clamp(0, 1))


PATCHES = {
    "at the readout": lambda: Patch(LAST, subtract_at(1.0)),
    "after a layer": lambda: Patch(LAST, layers={"layers.20": subtract_at(10.0)}),
}
"""The first exports with stock modules, the second with a file of code."""


@pytest.fixture
def folder(tmp_path):
    """For an export of half a gigabyte, which does not outlive its test."""
    yield tmp_path / "export"
    shutil.rmtree(tmp_path / "export")


@pytest.mark.usefixtures("golden_process")
@pytest.mark.parametrize("where", PATCHES)
def test_live_exported_and_a_fresh_process_embed_alike(real_llava, folder, where):
    patch = PATCHES[where]()
    transformer = load_backbone(str(real_llava))
    difference = export_patch(transformer, READOUT, patch, folder, ITEMS)
    assert difference <= 1e-5  # between the fresh process and the live model
    assert (folder / "patched_transformer.py").is_file() == bool(patch.layers)
    live = PatchedRetriever(with_readout(load_backbone(str(real_llava)), READOUT), patch)
    options = {"trust_remote_code": True} if patch.layers else {}
    exported = SentenceTransformer(str(folder), device="cpu", **options)
    expected_nd = live.encode_query(CHATS, convert_to_tensor=True)
    found_nd = exported.encode_query(CHATS, convert_to_tensor=True)
    assert float((found_nd - expected_nd).abs().max()) <= 1e-5
    base_nd = live.encode_query(CHATS, convert_to_tensor=True, patch=False)
    assert float((expected_nd - base_nd).abs().max()) > 1e-2


def test_a_backbone_embeds_texts_images_and_both(real_idefics3):
    model = with_readout(load_backbone(str(real_idefics3)), READOUT)
    found_nd = model.encode(CHATS, convert_to_tensor=True)
    assert found_nd.shape == (3, WIDTH)
    assert torch.allclose(found_nd.norm(dim=1), torch.ones(3), atol=1e-5)
    for chat, found_d in zip(CHATS, found_nd, strict=True):
        alone_d = model.encode([chat], convert_to_tensor=True)[0]
        assert float((alone_d - found_d).abs().max()) <= 1e-5
