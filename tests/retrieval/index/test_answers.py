"""Queries to what they find: roles, ranks, and the table of it."""

from __future__ import annotations

import numpy as np
import pytest

from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureBytes
from patch_retriever.retrieval.index.answers import Answer, Hit, answer
from patch_retriever.retrieval.index.indexing import IndexOptions, index_corpus
from patch_retriever.retrieval.index.search import SavedIndex
from toy_encoder import ToyEncoder, corpus


class Roles(ToyEncoder):
    """Remembers the role it was asked in."""

    def embed(self, items, role, batch_size=64):
        self.role = role
        return super().embed(items, role, batch_size)


@pytest.mark.parametrize(("role", "asked_as"), [("document", "query"), ("query", "document")])
def test_queries_are_encoded_in_the_other_role(tmp_path, role, asked_as):
    encoder = Roles()
    index_corpus(corpus(1, 2, 3), encoder, tmp_path / "ix", IndexOptions(role=role))
    answer(SavedIndex(tmp_path / "ix", encoder), encoder, [Item("text 2")], 2)
    assert encoder.role == asked_as


def test_the_nearest_come_first_with_their_scores(tmp_path):
    encoder, source = ToyEncoder(), corpus(*range(50))
    index_corpus(source, encoder, tmp_path / "ix")
    asked = [Item("text 7"), Item("anything else")]
    answers = answer(SavedIndex(tmp_path / "ix", encoder), encoder, asked, 50)
    scores = encoder.embed(asked, "query") @ encoder.embed(source.items, "document").T
    for q, found in enumerate(answers):
        assert found.query == asked[q]
        order = np.argsort(-scores[q])
        assert [hit.id for hit in found.hits] == [source.ids[i] for i in order]
        assert [hit.rank for hit in found.hits] == list(range(1, 51))
        np.testing.assert_allclose([hit.score for hit in found.hits], scores[q][order], atol=1e-5)
    assert answers[0].hits[0].text == "text 7"


def test_more_than_there_are_finds_all(tmp_path):
    encoder = ToyEncoder()
    index_corpus(corpus(1, 2, 3), encoder, tmp_path / "ix")
    (found,) = answer(SavedIndex(tmp_path / "ix", encoder), encoder, [Item("text 2")], 100)
    assert sorted(hit.id for hit in found.hits) == ["item-1", "item-2", "item-3"]


HITS = (Hit(1, 0.91234, "a/long-name.jpg", None, "/x"), Hit(2, -0.5, "b", "a  text\nof two", None))


def test_the_table_is_aligned_and_every_item_has_one_line():
    assert Answer(Item("a bag"), HITS).to_lines() == [
        "rank    score  id               text",
        "   1   0.9123  a/long-name.jpg",
        "   2  -0.5000  b                a text of two",
    ]
    assert Answer(Item("a bag"), HITS[:1]).to_lines()[0] == "rank    score  id"
    assert Answer(Item("a bag"), ()).to_lines() == ["nothing found"]


def test_what_a_terminal_would_obey_is_not_printed():
    wild = Hit(1, 0.5, "a\n\tb", "\x1b[31mred\x07 é", None)
    assert Answer(Item("a bag"), (wild,)).to_lines()[1] == "   1   0.5000  a b  [31mred é"


@pytest.mark.parametrize(
    ("item", "asked"),
    [
        (Item("a bag"), "a bag"),
        (Item(None, PictureBytes("p.jpg", b"")), "p.jpg"),
        (Item("in blue", PictureBytes("p.jpg", b"")), "p.jpg + in blue"),
    ],
)
def test_a_query_is_told_as_it_is_asked(item, asked):
    assert Answer(item, HITS).to_json() == {
        "query": asked,
        "hits": [vars(hit) for hit in HITS],
    }
