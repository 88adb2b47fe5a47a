"""Texts that nobody sees and texts that are no Unicode: refused by their row, in every reader."""

from __future__ import annotations

import json

import pytest

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.retrieval.readers.items import read_corpus
from patch_retriever.retrieval.readers.pairs import read_pairs
from patch_retriever.texts import shows, text_fault

UNSEEN = (" ", "\t\n", "\u200b", "\u200d\ufeff \u2060", "\u3000", "\u202e")
BROKEN = ("half \ud83d", "\udc00 half", "a\0b")
SOUND = (
    "a",
    "é",
    "日本",
    "👩\u200d👧",
    "שלום",
    "-",
    "a\u200bb",
    "\x1b[31mred",
    "\U00018cd6",
    "\ue000",
    "x" * 10_000,
)


@pytest.mark.parametrize("text", UNSEEN + BROKEN)
def test_what_is_no_text_has_a_fault(text):
    assert text_fault(text)
    assert shows(text) == (text in BROKEN)


@pytest.mark.parametrize("text", SOUND)
def test_any_text_that_shows_has_none(text):
    assert text_fault(text) is None


@pytest.mark.parametrize("text", UNSEEN + BROKEN)
def test_a_row_is_refused_by_its_place_and_left_out_on_request(tmp_path, text):
    rows = [{"text": "first"}, {"text": text}, {"text": "last"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a text ") as caught:
        read_corpus(path)
    assert str(caught.value).isprintable()
    corpus = read_corpus(path, skip_bad=True)
    assert [item.text for item in corpus.items] == ["first", "last"]
    assert len(corpus.skipped) == 1


def test_a_picture_with_a_text_of_nothing_is_a_picture(photo_folder):
    (photo_folder / "rows.jsonl").write_text(json.dumps({"image": "0.png", "text": "\u200b"}))
    (item,) = read_corpus(photo_folder / "rows.jsonl").items
    assert item.kind == "image"


@pytest.mark.parametrize("text", UNSEEN + BROKEN)
def test_a_pair_is_refused_by_its_place(photo_folder, text):
    rows = [json.loads(line) for line in (photo_folder / "pairs.jsonl").read_text().splitlines()]
    rows[3]["text"] = text
    path = photo_folder / "odd.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"odd\.jsonl:4: "):
        read_pairs(path)
    assert len(read_pairs(path, skip_bad=True).pairs) == len(rows) - 1


@pytest.mark.parametrize("text", [*UNSEEN, *BROKEN, ""])
def test_a_query_is_refused(text):
    with pytest.raises(UserError):
        Item.parse(text)
