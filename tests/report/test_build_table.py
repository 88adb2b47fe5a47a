"""The table of a build: what its rows are compared with."""

from __future__ import annotations

import numpy as np
import pytest

from patch_retriever.report.table import Row, Table
from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap

QUERIES = 40
CHOICE = {
    "id": "with",
    "reason": "best score",
    "folds": 1,
    "regret": 0.0,
    "queries": QUERIES,
}


def outcome(share: float) -> Outcome:
    hits_q3 = np.zeros((QUERIES, 3))
    hits_q3[: round(share * QUERIES)] = 1
    return Outcome({"t->i": hits_q3})


@pytest.fixture
def table() -> Table:
    rows = (
        Row("base", "base, chosen readout", "nothing", outcome(0.2)),
        Row("plain", "an alignment", "pairs", outcome(0.4)),
        Row("with", "an alignment with concepts", "pairs", outcome(0.7), without="plain"),
        Row("shuffled", "an alignment with others", "pairs", outcome(0.5), control_of="with"),
    )
    return Table(rows, "with", PairedBootstrap({"t->i": QUERIES}, 0), CHOICE)


def test_a_row_is_compared_with_its_controls_and_with_itself_without_concepts(table):
    by_id = {row["id"]: row["score_minus_others"] for row in table.to_json()["rows"]}
    assert by_id["base"] == by_id["plain"] == by_id["shuffled"] == {}
    found = by_id["with"]
    assert {name: pytest.approx(d["mean"]) for name, d in found.items()} == {
        "plain": 0.3,
        "shuffled": 0.2,
    }
    for difference in found.values():
        assert 0 < difference["low"] < difference["mean"] < difference["high"]


def test_a_footnote_says_what_concepts_add(table):
    (line,) = (one for one in table.footnotes() if one.startswith("an alignment with concepts"))
    assert "+30.00 [" in line
    assert "] over an alignment, +20.00 [" in line
    assert line.endswith("] over an alignment with others")
    assert line in table.to_text()
    assert line in table.to_markdown()


def test_without_its_counterpart_there_is_no_footnote(table):
    rows = tuple(row for row in table.rows if row.id != "plain")
    alone = Table(rows, "with", table.bootstrap, CHOICE)
    assert not any(line.startswith("an alignment with concepts") for line in alone.footnotes())
