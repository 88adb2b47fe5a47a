"""Factory strings: names for the usual ones, what they need, their search settings."""

from __future__ import annotations

import re

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.errors import UserError
from patch_retriever.retrieval.index import factory
from patch_retriever.retrieval.index.build import build_index
from patch_retriever.retrieval.index.factory import (
    NAMES,
    check_factory,
    default_search,
    factory_string,
    flat_vectors,
    import_faiss,
    matrix_products,
    new_index,
    sample_size,
    set_search,
    to_gpu,
)


@pytest.mark.parametrize(
    ("name", "n", "string"),
    [
        ("auto", 100, "Flat"),
        ("auto", 100_000, "Flat"),
        ("auto", 100_001, "IVF1024,Flat"),
        ("auto", 1_000_000, "IVF2048,Flat"),
        ("auto", 1_200_000, "IVF4096,SQ8"),
        ("flat", 10**9, "Flat"),
        ("Flat", 10, "Flat"),
        ("ivf", 10_000, "IVF128,Flat"),
        ("hnsw", 10_000, "HNSW32"),
        ("ivf-pq", 10_000_000, "RR1024,IVF8192,PQ128x8"),
        ("sq8", 100, "SQ8"),
        ("rabitq", 100, "RR1024,RaBitQ"),
        ("RaBitQ", 100, "RaBitQ"),
        ("OPQ16,IVF64,PQ16", 100, "OPQ16,IVF64,PQ16"),
    ],
)
def test_a_name_stands_for_a_string_by_the_size_of_the_corpus(name, n, string):
    assert factory_string(name, n, 1024) == string


@given(st.sampled_from(NAMES), st.integers(0, 10**9), st.integers(1, 5000))
def test_every_name_makes_an_index_that_its_corpus_can_train(name, n, dimension):
    string = factory_string(name, n, dimension)
    if found := re.search(r"IVF(\d+)", string):
        lists = int(found[1])
        assert lists == 1 or 40 * lists <= n
        assert lists & (lists - 1) == 0
    if "PQ" in string:
        assert dimension % int(string.split("PQ")[1].removesuffix("x8")) == 0


@pytest.mark.parametrize(
    ("string", "reason"),
    [
        ("nonsense", "could not parse index string nonsense"),
        ("PQ7", "should be a multiple"),
        ("", "could not parse"),
    ],
)
def test_a_string_that_faiss_does_not_take_is_one_line(string, reason):
    with pytest.raises(UserError, match=reason) as raised:
        new_index(string, 32)
    assert str(raised.value).startswith(f"index {string!r}: FAISS makes no index of 32 dimen")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("string", "settings"),
    [
        ("Flat", {}),
        ("IVF4,Flat", {"nprobe": 4}),
        ("IVF512,Flat", {"nprobe": 16}),
        ("HNSW8", {"efSearch": 64}),
        ("IVF16,SQ8", {"nprobe": 8}),
    ],
)
def test_searches_begin_with_more_than_faiss_own_settings(string, settings):
    assert default_search(new_index(string, 16)) == settings


def test_settings_reach_the_index():
    index = new_index("IVF16,Flat", 8)
    set_search(index, {"nprobe": 5})
    assert faiss.extract_index_ivf(index).nprobe == 5
    hnsw = new_index("HNSW8", 8)
    set_search(hnsw, {"efSearch": 99})
    assert faiss.downcast_index(hnsw.index).hnsw.efSearch == 99


def test_a_setting_that_an_index_lacks_is_one_line():
    with pytest.raises(UserError, match="efSearch=5: not a search setting of this index"):
        set_search(new_index("Flat", 8), {"efSearch": 5})


def test_a_sample_has_what_the_quantizers_ask_for():
    assert sample_size(new_index("Flat", 8)) == 0
    assert sample_size(new_index("IVF16,Flat", 8)) == 65_536
    assert sample_size(new_index("IVF4096,Flat", 8)) == 40 * 4096


def test_room_is_taken_once_and_not_by_doubling():
    index = new_index("Flat", 64)
    factory.reserve(index, 1000)
    codes = faiss.downcast_index(index.index).codes
    index.add_with_ids(np.ones((1, 64), np.float32), np.arange(1))
    where = int(codes.data())
    index.add_with_ids(np.ones((999, 64), np.float32), np.arange(999))
    assert int(codes.data()) == where  # it never had to move
    assert index.ntotal == 1000


@pytest.mark.parametrize("string", ["Flat", "SQ8", "RR64,RaBitQ", "HNSW8", "IVF1,Flat", "PCA8,SQ8"])
def test_room_can_be_taken_in_every_kind(string):
    rows = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    index = new_index(string, 64)
    index.train(rows)
    factory.reserve(index, 300)
    index.add_with_ids(rows, np.arange(300))
    assert index.ntotal == 300
    assert index.search(rows[:1], 5)[1].min() >= 0


def test_flat_indexes_give_their_vectors_back():
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    index = new_index("Flat", 4)
    index.add_with_ids(rows, np.arange(10))
    found = flat_vectors(index)
    np.testing.assert_array_equal(found[2:5], rows[2:5])
    np.testing.assert_array_equal(found[np.array([7, 1])], rows[[7, 1]])
    assert flat_vectors(new_index("SQ8", 4)) is None


def test_without_a_gpu_an_index_stays_where_it_is():
    index = new_index("Flat", 4)
    assert to_gpu(index) is index


@pytest.mark.parametrize("takes_it", [True, False])
def test_with_a_gpu_an_index_is_copied_there_where_it_can_be(monkeypatch, takes_it):
    def copy(index):
        if not takes_it:
            raise RuntimeError("not implemented on GPU")
        return ("on all GPUs", index)

    index = new_index("Flat", 4)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", copy, raising=False)
    assert to_gpu(index) == (("on all GPUs", index) if takes_it else index)


def test_without_faiss_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        new_index("Flat", 4)


def test_faiss_multiplies_matrices_while_ours_searches_and_is_as_before_then():
    faiss = import_faiss()
    before = faiss.cvar.distance_compute_blas_threshold
    with pytest.raises(ZeroDivisionError), matrix_products():
        assert faiss.cvar.distance_compute_blas_threshold == 4
        raise ZeroDivisionError
    assert faiss.cvar.distance_compute_blas_threshold == before


@pytest.mark.parametrize(
    ("string", "n", "words"),
    [
        ("nonsense", 1000, "FAISS makes no index of 16 dimensions"),
        ("PQ7", 1000, "FAISS makes no index of 16 dimensions"),
        ("IVF64,Flat", 63, "cannot be trained on 63 items"),
        ("PQ4x8", 255, "cannot be trained on 255 items"),
        ("RR16,IVF4,PQ4x8", 255, "cannot be trained on 255 items"),
        ("RR16,PQ4x8", 255, "cannot be trained on 255 items"),
    ],
)
def test_an_index_that_cannot_be_made_is_refused_before_its_vectors_are(string, n, words):
    with pytest.raises(UserError, match=words) as raised:
        check_factory(string, n, 16)
    assert "\n" not in str(raised.value)


@given(st.sampled_from([*NAMES, "IVF4,Flat", "PQ4x4", "OPQ4,PQ4x4", "HNSW8"]), st.integers(16, 600))
@settings(deadline=None, max_examples=30)
def test_what_is_not_refused_can_be_made(name, n):
    try:
        check_factory(name, n, 16)
    except UserError:
        return
    rows = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
    assert build_index(rows, name, 16).ntotal == n
