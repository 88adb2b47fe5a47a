"""Embedding stores: nothing is encoded twice, damage is seen, a stopped encoding goes on."""

from __future__ import annotations

import json
import resource
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureBytes, PictureFile
from patch_retriever.retrieval import embeddings
from patch_retriever.retrieval.embeddings import EmbeddingStore, StoredVectors, embed_items

WIDTH = 4


def vector(item: Item) -> np.ndarray:
    rng = np.random.default_rng(int(item.content_hash()[:8], 16))
    return rng.normal(size=WIDTH).astype(np.float32)


class Model:
    """Stands for an encoder; remembers what it was asked for, and may stop half-way."""

    workers = 2

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked: list[str | None] = []
        self.stop_after = stop_after

    def stream(self, items, _role, _prompt, _batch_size):
        """Seven at a time, the last first."""
        drawn, start = iter(items), 0
        while batch := list(islice(drawn, 7)):
            self.asked += [item.text for item in batch]
            if len(self.asked) > self.stop_after:
                raise KeyboardInterrupt
            positions = [*range(start, start + len(batch))][::-1]
            yield positions, np.stack([vector(item) for item in batch[::-1]])
            start += len(batch)

    def finish(self, pooled, _role):
        return 2 * pooled


def texts(*numbers: int) -> list[Item]:
    return [Item(f"text {i}") for i in numbers]


def store(folder, key="model", **more) -> EmbeddingStore:
    return EmbeddingStore(folder, key, WIDTH, **more)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(embeddings, "ROWS_PER_SHARD", 20)


def test_every_item_gets_its_own_vector_in_order(tmp_path):
    items = texts(*range(50))
    with store(tmp_path) as s:
        done = embed_items(Model(), items, "query", s)
        found = StoredVectors(Model(), "query", s, done.keys_n)[:]
        some = StoredVectors(Model(), "query", s, done.keys_n)[np.array([7, 3])]
    np.testing.assert_array_equal(found, 2 * np.stack([vector(i) for i in items]))
    np.testing.assert_array_equal(some, found[[7, 3]])
    assert (done.encoded, done.skipped) == (50, ())
    with store(tmp_path) as again:
        np.testing.assert_array_equal(2 * again.read(done.keys_n), found)


@given(st.lists(st.integers(0, 30), max_size=60), st.lists(st.integers(0, 30), max_size=60))
@settings(deadline=None)
def test_nothing_is_encoded_twice(tmp_path_factory, first, second):
    folder, model = tmp_path_factory.mktemp("store"), Model()
    for numbers in (first, second):
        with store(folder) as s:
            done = embed_items(model, texts(*numbers), "query", s)
            expected = [vector(item) for item in texts(*numbers)]
            np.testing.assert_array_equal(s.read(done.keys_n), np.reshape(expected, (-1, WIDTH)))
    assert len(model.asked) == len(set(model.asked)) == len({*first, *second})


def test_a_stopped_encoding_goes_on(tmp_path):
    items = texts(*range(60))
    with store(tmp_path) as s, pytest.raises(KeyboardInterrupt):
        embed_items(Model(stop_after=45), items, "query", s)
    model = Model()
    with store(tmp_path) as s:
        assert len(s) >= 40
        embed_items(model, items, "query", s)
        assert len(s) == 60
    assert len(model.asked) <= 20


def test_what_was_encoded_before_a_bad_item_stays(tmp_path):
    gone = Item(None, PictureFile(tmp_path / "gone.png"))
    with store(tmp_path) as s, pytest.raises(UserError, match=r"gone\.png"):
        embed_items(Model(), [*texts(*range(10)), gone], "query", s)
    with store(tmp_path) as s:
        assert len(s) == 7  # all finished batches


def test_a_slow_encoding_writes_shards_that_are_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "_FLUSH_SECONDS", 0)
    lengths = []

    class Looked(Model):
        def stream(self, items, *more):
            for found in super().stream(items, *more):
                lengths.append(len(s))
                yield found

    with store(tmp_path) as s:
        embed_items(Looked(), texts(*range(21)), "query", s)
    assert lengths == [0, 7, 14]


def test_progress_counts_items_that_are_there_and_those_that_are_encoded(tmp_path):
    seen = []

    def progress(steps, total):
        for step in steps:
            seen.append((step, total))
            yield step

    with store(tmp_path) as s:
        embed_items(Model(), texts(*range(0, 30, 3)), "query", s)
        embed_items(Model(), texts(*range(30), 1, 2), "query", s, progress=progress)
    assert seen == [(step, 32) for step in range(32)]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
@pytest.mark.parametrize("kind", ["keys", "vectors"])
def test_a_damaged_shard_is_named_and_its_items_are_encoded_again(tmp_path, damage, kind):
    items = texts(*range(60))
    with store(tmp_path) as s:
        keys = embed_items(Model(), items, "query", s).keys_n
    path = tmp_path / f"shard-00001.{kind}.npy"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    said, model = [], Model()
    with store(tmp_path, say=said.append) as s:
        assert 0 < (~s.has(keys)).sum() < 60
        embed_items(model, items, "query", s)
        np.testing.assert_array_equal(s.read(keys), np.stack([vector(i) for i in items]))
    (line,) = said
    assert line.startswith(f"{path}: damaged or missing")
    assert 0 < len(model.asked) < 60


def test_vectors_of_another_model_are_refused(tmp_path):
    with store(tmp_path) as s:
        embed_items(Model(), texts(1), "query", s)
    with pytest.raises(UserError, match="of another model"):
        store(tmp_path, key="other")


def test_a_damaged_list_of_shards_is_told(tmp_path):
    (tmp_path / "embeddings.json").write_text('{"key": "model"')
    with pytest.raises(UserError, match="damaged; delete"):
        store(tmp_path)


def test_two_cannot_write_at_once(tmp_path):
    with store(tmp_path), pytest.raises(UserError, match="another process"):
        store(tmp_path)


def test_a_full_disk_is_one_line_and_what_is_finished_stays(tmp_path):
    items = texts(*range(50))
    with store(tmp_path) as s:
        embed_items(Model(), items[:25], "query", s)
    before = len(json.loads((tmp_path / "embeddings.json").read_text())["shards"])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store(tmp_path) as s:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                embed_items(Model(), items, "query", s)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with store(tmp_path) as s:
        assert len(s) == 25
    assert len(json.loads((tmp_path / "embeddings.json").read_text())["shards"]) == before


def broken() -> Item:
    return Item(picture=PictureBytes("cut.png", b"\x89PNG\r\n\x1a\n...."))


def test_a_bad_picture_stops_or_is_left_out(tmp_path):
    items = [*texts(0, 1), broken(), *texts(2)]
    model = Model()
    with store(tmp_path) as s:
        done = embed_items(model, items, "query", s, skip_bad=True)
        good = done.keys_n != b""
        assert good.tolist() == [True, True, False, True]
        assert s.has(done.keys_n[good]).all()
    (line,) = done.skipped
    assert line.startswith("cut.png: not a readable image")
    assert model.asked == ["text 0", "text 1", "text 2"]


def test_a_vector_that_is_not_there_is_no_vector(tmp_path):
    with store(tmp_path) as s:
        keys = embed_items(Model(), texts(1), "query", s).keys_n
        with pytest.raises(KeyError):
            s.read(np.array([b"0123456789abcdef"]))
        assert s.read(keys).shape == (1, WIDTH)
