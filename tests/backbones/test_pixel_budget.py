"""The budget of pixels: fewer tokens of large pictures, as many of small ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from families import missing
from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import PAPER_READOUT
from patch_retriever.errors import UserError
from patch_retriever.items import Item


class Picture:
    """Of some size."""

    def __init__(self, width, height):
        self.name, self.size = f"{width} x {height}", (width, height)

    def open(self):
        picture = Image.new("RGB", self.size, "red")
        picture.paste("white", (0, 0, self.size[0] // 3, self.size[1]))
        return picture


LARGE, TALL = Picture(400, 400), Picture(100, 400)
# family: budget, image tokens of both without it, and with it (of one picture and of the tall one)
BUDGETS = {
    "qwen2-vl": (4 * 28 * 28, (16, 16), (4, 4)),
    "qwen2.5-vl": (9 * 28 * 28, (16, 16), (9, 6)),
    "qwen3-vl": (4 * 32 * 32, (16, 16), (4, 4)),
    "idefics3": (28 * 28, (5, 3), (1, 1)),
    "smolvlm": (28 * 28, (5, 3), (1, 1)),
    "internvl": (56 * 56, (4, 16), (4, 4)),
    "llava-onevision": (28 * 28, (24, 16), (10, 6)),
    "llava-next": (28 * 28, (24, 16), (10, 6)),
}
FIXED = ("llava", "gemma3", "paligemma2", "chameleon")


def loaded(stand_in, name, **options):
    if lacking := missing(name):
        pytest.skip(f"{name}: its processor needs {', '.join(lacking)}")
    return load_backbone(str(stand_in(name)), **options)


def image_tokens(transformer, picture):
    features = transformer.preprocess([Item(picture=picture).load()])
    with torch.no_grad():
        assert transformer(dict(features))["token_embeddings"].isfinite().all()
    return int((features["input_ids"] == image_token_id(transformer.config)).sum())


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_of_pixels_is_kept_by_the_model_and_its_export(stand_in, tmp_path, name):
    budget, without, within = BUDGETS[name]
    free, limited = loaded(stand_in, name), loaded(stand_in, name, max_pixels=budget)
    counts = {
        limit: (image_tokens(transformer, LARGE), image_tokens(transformer, TALL))
        for limit, transformer in ((None, free), (budget, limited))
    }
    assert counts == {None: without, budget: within}
    ample = loaded(stand_in, name, max_pixels=10**9)
    assert (image_tokens(ample, LARGE), image_tokens(ample, TALL)) == without
    model = with_readout(limited, PAPER_READOUT)
    model.save(str(tmp_path / "out"))
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    chat = Item(picture=LARGE).load()
    assert np.abs(again.encode([chat]) - model.encode([chat])).max() < 1e-5
    assert image_tokens(again[0], LARGE) == within[0]
    assert image_tokens(load_backbone(str(tmp_path / "out")), LARGE) == within[0]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_below_the_least_is_refused(stand_in, name):
    with pytest.raises(UserError, match=r"^\S+: 100 pixels are too few; its least is \d+$"):
        loaded(stand_in, name, max_pixels=100)


@pytest.mark.parametrize("name", FIXED)
def test_a_family_of_one_size_says_so(stand_in, name):
    with pytest.raises(UserError, match="makes equally many tokens of every picture; leave"):
        loaded(stand_in, name, max_pixels=10**6)
