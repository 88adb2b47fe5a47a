"""Items as model inputs, in batches."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from patch_retriever.backbones import inputs
from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import PLAIN, Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.pictures.picture import PictureFile, _Stored
from pictured import ITEMS, SHORT, Plain


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


class Sized(_Stored):
    """A picture of a size; those that are decoded and alive are counted."""

    alive = most = 0

    def __init__(self, number, width=72, height=72):
        self.number, self.shape = number, (width, height)

    @property
    def name(self):
        return f"picture {self.number}"

    def read(self):
        return self.number.to_bytes(4, "big")

    def size(self):
        return self.shape

    def open(self):
        image = Image.new("RGB", self.shape, (self.number % 256, 30, 30))
        Sized.alive += 1
        Sized.most = max(Sized.most, Sized.alive)
        weakref.finalize(image, Sized.forgotten)
        return image

    @staticmethod
    def forgotten():
        Sized.alive -= 1


def in_batches(transformer, items, batch_size, **more):
    return [numbers for numbers, _ in item_batches(transformer, items, batch_size, **more)]


@pytest.fixture
def by_pixels(monkeypatch):
    """As if the processor made a token of so many pixels."""
    monkeypatch.setattr(inputs, "picture_tokens", lambda _, sizes: [w * h / 784 for w, h in sizes])
    monkeypatch.setattr(inputs, "in_memory", lambda picture: picture)


@pytest.mark.usefixtures("by_pixels")
def test_pictures_of_similar_size_are_together_the_smallest_first(transformer):
    sides = [28 * s for s in (1, 9, 2, 8, 3, 7, 4, 6)]
    items = [Item(None, Sized(i, side, 28)) for i, side in enumerate(sides)]
    assert in_batches(transformer, items, 2) == [[0, 2], [4, 6], [7, 5], [3, 1]]


@pytest.mark.usefixtures("by_pixels")
def test_a_text_counts_beside_its_picture(transformer):
    items = [
        Item("a" * letters, Sized(i, 28 * tokens, 28))
        for i, (letters, tokens) in enumerate([(4, 9), (60, 1), (4, 10), (4, 1)])
    ]
    assert in_batches(transformer, items, 2) == [[3, 0], [2, 1]]


@pytest.mark.usefixtures("by_pixels")
def test_only_a_few_batches_of_pictures_are_decoded_at_a_time(transformer):
    items = [Item(None, Sized(i)) for i in range(120)]
    for workers in (1, 3):
        Sized.most = 0
        for _ in item_batches(transformer, items, 4, workers=workers):
            time.sleep(0.01)
        assert 4 <= Sized.most <= 4 * workers
    gc.collect()
    assert Sized.alive == 0


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_more_workers_give_the_same_batches(transformer, workers):
    rng = random.Random(0)
    items = [
        Item("a cat on a mat " * rng.randint(0, 4) + ".", Plain() if rng.random() < 0.5 else None)
        for _ in range(40)
    ]
    found = list(item_batches(transformer, items, 3, workers=workers))
    expected = list(item_batches(transformer, items, 3, workers=1))
    assert [numbers for numbers, _ in found] == [numbers for numbers, _ in expected]
    assert sorted(n for numbers, _ in found for n in numbers) == list(range(40))
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if torch.is_tensor(value) else True


def test_the_processor_of_the_model_is_left_as_it_was(transformer):
    before = transformer.processor
    list(item_batches(transformer, [Item(SHORT)] * 9, 2, workers=3))
    assert transformer.processor is before
    assert transformer.input_formatter.processor is before


def test_a_copy_for_a_thread_shares_the_weights_and_has_its_own_tokenizer(transformer):
    twin = inputs.twin(transformer)
    assert twin.model is transformer.model
    assert twin.processor is not transformer.processor
    assert twin.input_formatter.processor is twin.processor
    assert twin.tokenizer._tokenizer is not transformer.tokenizer._tokenizer
    assert "processor" not in twin._modules


def test_a_bad_picture_is_named_after_the_batches_before_it(transformer, tmp_path):
    good = Image.new("RGB", (30, 30))
    for i in range(40):
        good.save(tmp_path / f"{i}.png")
    (tmp_path / "33.png").write_bytes((tmp_path / "33.png").read_bytes()[:40])
    items = [Item(None, PictureFile(tmp_path / f"{i}.png")) for i in range(40)]
    found = []
    with pytest.raises(UserError, match=r"33\.png: not a readable image"):
        for numbers, _ in item_batches(transformer, items, 2, workers=3):
            found.append(numbers)
    assert len(found) >= 16  # all of the first window and of its own before it
    (tmp_path / "33.png").unlink()
    with pytest.raises(UserError, match=r"33\.png: no such image file"):
        list(item_batches(transformer, items, 2, workers=3))


def test_items_are_made_and_read_in_their_order_by_one_thread(transformer):
    made = []

    def make(number):
        made.append((number, threading.get_ident()))
        return Item(f"text {number}" + "." * (number * 7 % 20))

    items = Lazy(range(50), make)
    list(inputs.Preparer(transformer, 4).batches(items, 2))
    assert [number for number, _ in made] == list(range(50))
    assert len({thread for _, thread in made}) == 1


@pytest.mark.usefixtures("by_pixels")
def test_a_collection_comes_by_kind_and_length_of_text(transformer):
    texts = [Item("a" * n) for n in random.Random(0).sample(range(1, 200), 60)]
    order = [
        n for batch in in_batches(transformer, [*texts, Item(None, Sized(0))], 2) for n in batch
    ]
    assert order == [60, *sorted(range(60), key=lambda n: len(texts[n].text))]


def test_tokens_of_pictures_are_what_the_processor_makes_of_them(stand_in):
    for name in ("llava", "idefics3", "gemma3"):
        backbone = load_backbone(str(stand_in(name)))
        set_readout(backbone, Readout(PLAIN))
        sizes = [(200, 64), (64, 64), (64, 300)]
        said = inputs.picture_tokens(backbone.processor, sizes)
        pictures = [Image.new("RGB", size) for size in sizes]
        features = backbone.preprocess([Item("a", Held(p)).load() for p in pictures])
        made = (features["input_ids"] == image_token_id(backbone.config)).sum(1).tolist()
        assert np.argsort(said, kind="stable").tolist() == np.argsort(made, kind="stable").tolist()


def test_pixels_stand_for_tokens_where_the_processor_cannot_say():
    small, large = inputs.picture_tokens(object(), [(28, 28), (56, 280)])
    assert large == 20 * small == 20


class Held:
    """A decoded picture."""

    name = "held"

    def __init__(self, image):
        self.open = lambda: image
