"""Migration: a migrated index is the one that encoding again would make, or a line says why not."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.operators import Subtract
from patch_retriever.retrieval.index.indexing import IndexOptions, add_corpus, index_corpus
from patch_retriever.retrieval.index.manifest import MANIFEST, Manifest
from patch_retriever.retrieval.index.migration import migrate
from patch_retriever.retrieval.index.removing import remove_items
from patch_retriever.retrieval.index.search import SavedIndex
from toy_encoder import ToyEncoder, corpus

OLD, NEW = ToyEncoder("old", head=1), ToyEncoder("new", head=2, shift=0.5, dimension=6)
PLAIN = ToyEncoder("plain", head=None)
SOURCE = corpus(*range(100))


def make(folder, encoder, source=SOURCE, factory="flat", **more):
    index_corpus(source, encoder, folder, IndexOptions(factory, **more))
    return folder


def all_found(folder, encoder, source=SOURCE):
    """Every item's id and score, for some queries: the same for the same vectors."""
    queries = encoder.embed(corpus(*range(5), prefix="question").items, "query")
    index = SavedIndex(folder, encoder)
    scores, numbers = index.search(queries, len(source.ids))
    entries = index.items.entries(numbers.ravel().tolist())
    by_id = [
        dict(zip((entries[n].id for n in row), line, strict=True))
        for row, line in zip(numbers.tolist(), scores, strict=True)
    ]
    return np.array([[row[name] for name in source.ids] for row in by_id])


@pytest.mark.parametrize("factory", ["flat", "sq8", "IVF2,Flat", "hnsw"])
def test_migrated_is_encoded_again(tmp_path, factory):
    old = make(tmp_path / "old", OLD, factory=factory, shard_items=30)
    new = ToyEncoder("new", head=2, shift=0.5, dimension=6)
    assert migrate(old, new, tmp_path / "new") == 100
    assert new.encoded == []
    again = make(tmp_path / "again", NEW, factory=factory, shard_items=30)
    np.testing.assert_allclose(
        all_found(tmp_path / "new", NEW), all_found(again, NEW), atol=1e-6, rtol=0
    )
    manifest = Manifest.read(tmp_path / "new" / MANIFEST)
    assert (manifest.made_by.model, manifest.dimension, len(manifest.shards)) == ("new", 6, 4)
    assert all_found(old, OLD).shape == (5, 100)  # the old one is as it was


def test_what_was_removed_stays_away_and_what_was_added_comes_along(tmp_path):
    old = make(tmp_path / "old", OLD, shard_items=40)
    remove_items(old, ["item-0", "item-50", "item-99"])
    add_corpus(corpus(0, 200), OLD, old)
    migrate(old, NEW, tmp_path / "new")
    now = corpus(*(i for i in [*range(100), 200] if i not in (50, 99)))
    again = make(tmp_path / "again", NEW, source=now)
    np.testing.assert_allclose(
        all_found(tmp_path / "new", NEW, now), all_found(again, NEW, now), atol=1e-6, rtol=0
    )


def test_a_migrated_index_can_be_added_to_and_migrated_back(tmp_path):
    old = make(tmp_path / "old", OLD)
    migrate(old, NEW, tmp_path / "new")
    shutil.rmtree(old)
    encoder = ToyEncoder("new", head=2, shift=0.5, dimension=6)
    add_corpus(corpus(1000), encoder, tmp_path / "new")
    assert len(encoder.encoded) == 1
    migrate(tmp_path / "new", OLD, tmp_path / "back")
    now = corpus(*range(100), 1000)
    again = make(tmp_path / "again", OLD, source=now)
    np.testing.assert_allclose(
        all_found(tmp_path / "back", OLD, now), all_found(again, OLD, now), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (ToyEncoder("other", trunk="else"), "other differs from old before the pooling"),
        (ToyEncoder("other", asks="?"), "other puts another prompt before items than old"),
        (ToyEncoder("other"), "made by this very model"),
    ],
)
def test_a_model_that_differs_before_the_pooling_is_refused(tmp_path, other, why):
    old = make(tmp_path / "old", OLD)
    with pytest.raises(UserError, match=why) as raised:
        migrate(old, other, tmp_path / "new")
    if other.fingerprint != OLD.fingerprint:
        assert str(raised.value).endswith(
            "so the items must be encoded again: "
            f"patch-retriever index ITEMS -m other -o {tmp_path / 'new'}"
        )
    assert not (tmp_path / "new").exists()


def test_a_patch_on_tokens_is_named(tmp_path):
    old = make(tmp_path / "old", OLD)
    rows = (torch.zeros(3, 1), torch.zeros(1), torch.ones(1), torch.zeros(1, 3))
    Patch("last_hidden_state", Subtract(torch.tensor([5]), torch.ones(1), *rows)).save(
        tmp_path / "patched" / "patch"
    )
    patched = ToyEncoder(str(tmp_path / "patched"), trunk="else")
    with pytest.raises(UserError, match=r"the patch of .*patched works on tokens, before the pool"):
        migrate(old, patched, tmp_path / "new")
    with pytest.raises(UserError, match=r"the patch of .*patched works on tokens, before the pool"):
        migrate(make(tmp_path / "patched-index", patched), OLD, tmp_path / "new")


def test_an_index_that_is_there_is_not_written_over(tmp_path):
    old, there = make(tmp_path / "old", OLD), make(tmp_path / "new", PLAIN)
    with pytest.raises(UserError, match="holds an index; name another folder"):
        migrate(old, NEW, there)


def test_damaged_embeddings_are_one_line(tmp_path):
    old = make(tmp_path / "old", OLD)
    (path,) = (old / "embeddings").rglob("*.vectors.npy")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="embeddings: damaged; encode the items again"):
        migrate(old, NEW, tmp_path / "new")


# Without the pooled vectors


def without_store(folder, encoder, factory="flat"):
    return make(folder, encoder, factory=factory, keep_embeddings=False, shard_items=30)


def test_unit_vectors_are_enough_from_a_flat_index_of_a_plain_model(tmp_path):
    linear = ToyEncoder("linear", head=2)
    migrate(without_store(tmp_path / "old", PLAIN), linear, tmp_path / "new")
    again = make(tmp_path / "again", linear)
    np.testing.assert_allclose(
        all_found(tmp_path / "new", linear), all_found(again, linear), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("old", "new", "factory", "why"),
    [
        (PLAIN, OLD, "sq8", "an index of SQ8 does not hold whole vectors"),
        (OLD, PLAIN, "flat", "the patch of old cannot be taken back"),
        (PLAIN, NEW, "flat", "the patch of new looks at the lengths of pooled vectors"),
    ],
)
def test_where_they_are_not_a_line_says_why(tmp_path, old, new, factory, why):
    folder = without_store(tmp_path / "old", old, factory)
    with pytest.raises(UserError, match=f"were not kept .embeddings/. and {why}.*encoded again"):
        migrate(folder, new, tmp_path / "new")
    with pytest.raises(UserError, match="no index"):
        SavedIndex(tmp_path / "new")
