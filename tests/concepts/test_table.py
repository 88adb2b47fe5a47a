"""The concept table on disk: scores, top items, tokens and selection, for any Parquet reader."""

from __future__ import annotations

from dataclasses import fields

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.concepts.table import ConceptTable, add_selection, examples, top_items
from patch_retriever.sae.codes import Codes

C = 9
SCORES = [f.name for f in fields(ConceptTable)]
steady = settings(deadline=None, derandomize=True)


def make_table():
    generator = torch.Generator().manual_seed(0)
    return ConceptTable(**{name: torch.rand(C, generator=generator) for name in SCORES})


def by_sorting(z_nc, items, concept, top):
    """(item, activation) of the items in which a concept is active, largest first."""
    active = [(n, float(z_nc[n, concept])) for n in items if z_nc[n, concept] != 0]
    return sorted(active, key=lambda pair: (-pair[1], pair[0]))[:top]


VALUES = st.sampled_from([0.0, 0.0, 0.5, 0.5, 1.25, 3.0])


@steady
@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_top_items_are_those_of_a_dense_column_sorted(data, n, c, top):
    values = data.draw(st.lists(VALUES, min_size=n * c, max_size=n * c))
    z_nc = torch.tensor(values).reshape(n, c)
    items = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    found = top_items(Codes.from_dense(z_nc), torch.tensor(items, dtype=torch.long), top)
    assert [[(e["item"], e["value"]) for e in row] for row in found.to_pylist()] == [
        by_sorting(z_nc, items, concept, top) for concept in range(c)
    ]


def test_scores_survive_the_disk(tmp_path):
    table = make_table()
    table.save(tmp_path / "concepts.parquet")
    loaded = ConceptTable.load(tmp_path / "concepts.parquet")
    for name in SCORES:
        assert torch.equal(getattr(loaded, name), getattr(table, name)), name


@pytest.fixture
def finished(tmp_path):
    """A whole table: scores, items, tokens, and a selection of two concepts."""
    z_nc = torch.zeros(6, C)
    z_nc[0, 2], z_nc[3, 2], z_nc[1, 2], z_nc[2, 5] = 1.0, 2.0, 3.0, 4.0
    kinds_n = torch.arange(6) % 3
    tokens = [[f"token {i}", " more"] for i in range(C)]
    more = examples(Codes.from_dense(z_nc), kinds_n, tokens, "of somewhere")
    make_table().save(tmp_path / "scored.parquet", more)
    path = tmp_path / "concepts.parquet"
    add_selection(tmp_path / "scored.parquet", {2: 1.0, 7: 0.25}, "a method: a reason", path)
    return path


def test_a_finished_table_has_every_column(finished):
    table = pq.read_table(finished)
    shown = ["top_images", "top_texts", "tokens"]
    assert table.column_names == ["concept", *SCORES, *shown, "strength", "why"]
    assert table["concept"].to_pylist() == list(range(C))
    entry = pa.struct([("item", pa.int32()), ("value", pa.float32())])
    assert table.schema.field("top_texts").type.value_type == entry
    assert table.schema.field("tokens").metadata == {b"unembedding": b"of somewhere"}


def test_scores_can_be_read_from_a_finished_table(finished):
    assert torch.equal(ConceptTable.load(finished).bridge, make_table().bridge)


def test_pandas_reads_it(finished):
    frame = pd.read_parquet(finished).set_index("concept")
    assert frame["modality"].tolist() == make_table().modality.tolist()
    assert [dict(e) for e in frame.loc[2, "top_texts"]] == [
        {"item": 3, "value": 2.0},
        {"item": 0, "value": 1.0},
    ]
    assert [dict(e) for e in frame.loc[2, "top_images"]] == [{"item": 1, "value": 3.0}]
    assert len(frame.loc[5, "top_texts"]) == len(frame.loc[5, "top_images"]) == 0  # item 2 is both
    assert list(frame.loc[4, "tokens"]) == ["token 4", " more"]
    assert frame["strength"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0.25, 0]
    assert [i for i, why in frame["why"].items() if why == "a method: a reason"] == [2, 7]
    assert set(frame["why"]) == {"", "a method: a reason"}
