"""Vectors on disk: rows are those asked for, a bounded chunk at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.retrieval import vectors
from patch_retriever.retrieval.vectors import Shards, at_hand, chunks


def numbered(n: int) -> np.ndarray:
    return np.arange(2 * n, dtype=np.float32).reshape(n, 2)


def test_mapped_shards_are_read_a_chunk_at_a_time_without_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 4)
    np.save(tmp_path / "a.npy", numbered(10))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    found = list(chunks(Shards([mapped]), range(10)))
    assert [len(chunk) for chunk in found] == [4, 4, 2]
    assert all(np.shares_memory(chunk, mapped) for chunk in found)
    np.testing.assert_array_equal(np.concatenate(found), numbered(10))


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_rows_are_those_asked_for(data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    rows = numbered(sum(sizes))
    shards = Shards(np.split(rows, np.cumsum(sizes)[:-1]))
    assert len(shards) == len(rows)
    any_row = st.integers(0, len(rows) - 1) if len(rows) else st.nothing()
    wanted = np.array(data.draw(st.lists(any_row)), dtype=np.int64)
    np.testing.assert_array_equal(shards[wanted], rows[wanted])
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(rows))] * 2)))
    np.testing.assert_array_equal(shards[start:stop], rows[start:stop])
    found = np.concatenate([rows[:0], *chunks(shards, wanted)])
    np.testing.assert_array_equal(found, rows[wanted])


def test_little_is_kept_at_hand_and_much_stays_where_it_is():
    shards = Shards([numbered(3), numbered(2)])
    assert at_hand(shards, most=39) is shards
    np.testing.assert_array_equal(
        at_hand(shards, most=40), np.concatenate([numbered(3), numbered(2)])
    )
