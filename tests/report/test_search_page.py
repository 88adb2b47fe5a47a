"""The page of a search: self-contained, escaped, whole where a picture is gone."""

from __future__ import annotations

import re

from patch_retriever.items import Item
from patch_retriever.report.search_page import write_search_page
from patch_retriever.retrieval.index.answers import answer
from patch_retriever.retrieval.index.indexing import index_corpus
from patch_retriever.retrieval.index.search import SavedIndex
from toy_encoder import ToyEncoder, corpus, pictures


def page(tmp_path, source, queries, k=10):
    encoder = ToyEncoder()
    if not (tmp_path / "ix").exists():
        index_corpus(source, encoder, tmp_path / "ix")
    index = SavedIndex(tmp_path / "ix", encoder)
    write_search_page(tmp_path / "page.html", index, answer(index, encoder, queries, k))
    return (tmp_path / "page.html").read_text()


def test_every_hit_has_its_thumbnail_inside_the_page(tmp_path):
    source = pictures(tmp_path, 4)
    text = page(tmp_path, source, [Item("a query"), source.items[1]])
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', text)) == 4 + 1 + 4
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    for name in source.ids:
        assert text.count(f'<span class="faint">{name}</span>') == 2
    assert '<span class="said">a query</span>' in text


def test_what_items_say_is_no_markup(tmp_path):
    text = page(tmp_path, corpus(1, prefix="<script>alert(1)</script>"), [Item("<b>bold</b>")])
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;bold" in text


def test_a_picture_that_is_gone_is_a_line_and_the_rest_stays(tmp_path):
    source = pictures(tmp_path, 3)
    page(tmp_path, source, [Item("a query")])
    (tmp_path / "1.png").unlink()
    text = page(tmp_path, source, [Item("a query")])
    assert len(re.findall("<img ", text)) == 2
    assert "1.png: no such picture" in text


def test_no_hit_is_said(tmp_path):
    from patch_retriever.retrieval.index.removing import remove_items

    source = corpus(1)
    page(tmp_path, source, [Item("a query")])
    remove_items(tmp_path / "ix", source.ids)
    assert "Nothing found." in page(tmp_path, source, [Item("a query")])
