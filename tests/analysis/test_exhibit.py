"""Rows of exhibits against plain means; files and sections."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.analysis.exhibit import Exhibit, Yardstick, mean_outcome, section
from patch_retriever.items import Item
from patch_retriever.report import plots
from patch_retriever.retrieval.collection import Collection, Task
from patch_retriever.retrieval.evaluate import Outcome

steady = settings(deadline=None, derandomize=True, max_examples=30)
SIZES = {"t->i full": 30, "i->t": 12}


def collection():
    tasks = tuple(
        Task(name, name.split()[0], tuple(range(n)), (0, 1), ((0,),) * n)
        for name, n in SIZES.items()
    )
    return Collection("test", (Item("a"),) * 30, tasks)


def outcome(seed):
    rng = np.random.default_rng(seed)
    found = {}
    for name, n in SIZES.items():
        ranks = rng.integers(1, 14, n)
        found[name] = (ranks[:, None] <= np.array([1, 5, 10])).astype(float)
    return Outcome(found)


@steady
@given(st.integers(0, 1000))
def test_rows_hold_plain_means_and_differences(seed):
    a, base = outcome(seed), outcome(seed + 1)
    *tasks, average = Yardstick(base, "the base", collection(), 0).rows({"beta": 0.5}, a)
    assert [row["task"] for row in tasks] == list(SIZES)
    for row in tasks:
        hits, other = a.hits_by_task[row["task"]], base.hits_by_task[row["task"]]
        assert row["queries"] == SIZES[row["task"]]
        for i, k in enumerate((1, 5, 10)):
            assert row[f"R@{k}"] == pytest.approx(hits[:, i].mean())
        assert row["score"] == pytest.approx(hits.mean())
        assert row["R@1_minus_base"] == pytest.approx(hits[:, 0].mean() - other[:, 0].mean())
        assert row["score_minus_base"] == pytest.approx(hits.mean() - other.mean())
        for name in ("R@1", "score"):
            low, mean, high = (row[f"{name}_minus_base{end}"] for end in ("_low", "", "_high"))
            assert low <= mean + 1e-9 and mean <= high + 1e-9
    assert (average["task"], average["split"], average["base"]) == ("average", "test", "the base")
    assert average["score"] == pytest.approx(a.score)
    assert average["R@1"] == pytest.approx(np.mean([row["R@1"] for row in tasks]))
    assert average["score_minus_base"] == pytest.approx(a.score - base.score)
    assert average["beta"] == 0.5


def test_a_band_lies_around_the_recall_itself_of_the_tasks_that_are_named():
    a = outcome(3)
    yard = Yardstick(a, "itself", collection(), 0)
    d = yard.band(a, 1, ["i->t"])
    assert d.mean == pytest.approx(a.recalls("i->t")[1])
    spread = a.hits_by_task["i->t"][:, 1].std() / np.sqrt(12)
    assert d.high - d.low == pytest.approx(2 * 1.96 * spread, rel=0.25)
    assert yard.band(a).mean == pytest.approx(a.score)


def test_a_summary_is_in_percent_and_names_the_change():
    a, base = outcome(1), outcome(2)
    row = Yardstick(base, "base", collection(), 0).summary({"method": "x"}, a)
    assert list(row) == ["method", "t->i full", "i->t", "score", "score against base"]
    assert row["score"] == f"{100 * a.score:.1f}"
    assert row["score against base"].startswith(f"{100 * (a.score - base.score):+.1f} [")


def test_the_mean_of_draws_is_taken_query_by_query():
    mean = mean_outcome([outcome(0), outcome(1)])
    expected = (outcome(0).hits_by_task["i->t"] + outcome(1).hits_by_task["i->t"]) / 2
    np.testing.assert_allclose(mean.hits_by_task["i->t"], expected)


def test_an_exhibit_is_written_and_shown(tmp_path):
    figure = plots.lines([plots.Series("a", [1, 2], [3, 4])], "x", "y")
    rows = [{"n": 1, "share": 1 / 3}, {"n": 2, "share": 0.5}]
    Exhibit(rows, [{"what": "x", "value": "1"}], {"": figure, "-more": figure}, "A note.").save(
        "fig9", tmp_path, "abc"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fig9-more.svg",
        "fig9.csv",
        "fig9.svg",
        "result.json",
    ]
    with (tmp_path / "fig9.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"n": "1", "share": "0.333333"},
            {"n": "2", "share": "0.5"},
        ]
    assert "<svg" in (tmp_path / "fig9.svg").read_text()
    values = {"files": ["fig9.csv", "fig9.svg"], "summary": [{"a": 1, "b": "c"}], "note": "A note."}
    shown = section(values)
    assert "![fig9.svg](fig9.svg)" in shown
    assert "| a | b |\n| --- | --- |\n| 1 | c |" in shown
    assert "A note." in shown and "[fig9.csv](fig9.csv)" in shown


def test_an_exhibit_that_is_left_out_says_so(tmp_path):
    Exhibit([], note="Left out: why.").save("fig9", tmp_path, "abc")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_counterpart_is_drawn_dashed_in_the_colour_of_its_line():
    figure = plots.lines(
        [
            plots.Series("a", [1, 2], [3, 4]),
            plots.Series("b", [1, 2], [4, 4]),
            plots.Series("random like b", [1, 2], [2, 2], [1, 1], [3, 3], like="b"),
        ],
        "x",
        "y",
    )
    (axes,) = figure.axes
    a, b, like = axes.get_lines()
    assert like.get_color() == b.get_color() != a.get_color()
    assert (b.get_linestyle(), like.get_linestyle()) == ("-", "--")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert len(axes.collections) == 0  # no band
