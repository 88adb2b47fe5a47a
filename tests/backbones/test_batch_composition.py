"""What else is in a batch does not change an embedding, in any family."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from families import FAMILIES, parameter
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER_READOUT, Readout
from patch_retriever.items import Item
from patch_retriever.retrieval.encoder import Encoder

READOUTS = (PAPER_READOUT, Readout(ONE_WORD, pooling="lasttoken"))


class Noise:
    """A picture that no other is like."""

    def __init__(self, number: int, size: tuple[int, int]) -> None:
        self.name, self.size, self.number = f"noise {number}", size, number

    def open(self):
        rng = np.random.default_rng(self.number)
        return Image.fromarray(rng.integers(0, 256, (*self.size, 3), dtype=np.uint8))


ITEMS = [
    Item("a cat"),
    Item("two small dogs on a large mat, one of them asleep, and a cat that watches them both"),
    Item(None, Noise(0, (64, 64))),
    Item("a mat", Noise(1, (120, 40))),
    Item(None, Noise(2, (30, 150))),
    Item("."),
    Item("describe the image and two small dogs on a mat in one word", Noise(3, (70, 50))),
]


@pytest.fixture(scope="module", params=map(parameter, FAMILIES))
def backbone(request, stand_in):
    return load_backbone(str(stand_in(request.param)))


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.prompt.name)
def test_an_embedding_does_not_depend_on_its_batch(backbone, readout):
    encoder = Encoder(with_readout(backbone, readout), "stand-in", workers=2)
    alone_nd = np.concatenate([encoder.embed([item], "document") for item in ITEMS])
    distances = np.linalg.norm(alone_nd[:, None] - alone_nd[None], axis=2)
    assert distances[~np.eye(len(ITEMS), dtype=bool)].min() > 1e-3  # ten times what is allowed
    order = list(range(len(ITEMS)))
    for side in ("left", "right"):
        backbone.tokenizer.padding_side = side
        for batch_size in (2, 3, len(ITEMS)):
            random.Random(batch_size).shuffle(order)
            found_nd = encoder.embed([ITEMS[n] for n in order], "document", batch_size=batch_size)
            np.testing.assert_allclose(found_nd, alone_nd[order], atol=1e-5)
