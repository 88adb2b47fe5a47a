"""Items as model inputs, in batches."""

from __future__ import annotations

import pytest
from PIL import Image

from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import PLAIN, Readout
from patch_retriever.items import Item


class Plain:
    """A picture of one colour."""

    name = "plain"

    def open(self):
        return Image.new("RGB", (72, 72), (200, 30, 30))


SHORT, LONG = "a cat", "two small cats on a large grey mat, one of them asleep"
ITEMS = {
    "text": Item(SHORT),
    "long text": Item(LONG),
    "image": Item(picture=Plain()),
    "both": Item(SHORT, Plain()),
    "long both": Item(LONG, Plain()),
}


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


def test_batches_hold_every_item_once_with_similar_items_together(transformer):
    set_readout(transformer, Readout(PLAIN))
    items = [*ITEMS.values(), *ITEMS.values()]
    batches = list(item_batches(transformer, items, batch_size=2))
    assert sorted(n for numbers, _ in batches for n in numbers) == list(range(len(items)))
    for numbers, features in batches:
        assert len(features["input_ids"]) == len(numbers)
        assert len({(items[n].kind, items[n].text) for n in numbers}) == 1


def test_rows_of_a_batch_belong_to_the_items_they_are_numbered_with(transformer):
    set_readout(transformer, Readout(PLAIN))
    items = list(ITEMS.values())
    for numbers, features in item_batches(transformer, items, batch_size=3):
        for number, ids_t in zip(numbers, features["input_ids"], strict=True):
            decoded = transformer.tokenizer.decode(ids_t)
            assert (items[number].text or "") in decoded
            assert ("<image>" in decoded) == (items[number].picture is not None)
