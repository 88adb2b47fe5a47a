"""A comparison as a table and as a page."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_report_page import Page
from wild import ATTACK, ENDLESS

from browsing import looked_at
from patch_retriever.items import Item
from patch_retriever.report.comparison import metric_name, p_text, to_json, to_text
from patch_retriever.report.comparison_page import comparison_page
from patch_retriever.retrieval.comparison.result import Comparison, Row, Settings
from patch_retriever.retrieval.comparison.trial import try_out
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.scenes.tasks import scenes_collection

D = 12


def row_of(name: str, tasks: dict[str, RetrievalTask], noise: float, plain: bool = True) -> Row:
    """A model that knows the answers, but for noise."""
    trials = {}
    for label, task in tasks.items():
        rng = np.random.default_rng(0)
        candidates_nd = rng.normal(size=(len(task.candidates), D))
        at = {c: i for i, c in enumerate(task.candidate_ids)}
        answers = [at[next(iter(task.qrels[q]))] for q in task.query_ids]
        queries_qd = candidates_nd[answers] + noise * rng.normal(size=(len(answers), D))
        sides = [
            (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
            for x in (queries_qd, candidates_nd)
        ]
        kinds = tuple(np.zeros(len(side), np.int8) for side in sides)
        trial = try_out(task, *sides, kinds, (1, 5))
        figures = {"encoded_items": 10, "encode_seconds": 2.0}
        trials[label] = replace(trial, figures=trial.figures | figures)
    return Row(name, f"/models/{name}", "pairs", name, trials, plain)


def compared(tasks: dict[str, RetrievalTask], *others: tuple[str, float, bool]) -> Comparison:
    rows = [row_of("before", tasks, 2.0), *(row_of(n, tasks, x, plain) for n, x, plain in others)]
    return Comparison(tasks, tuple(rows), Settings(cutoffs=(1, 5)))


@pytest.fixture(scope="module")
def tasks():
    found = scenes_collection("test", 25, 0).retrieval_tasks()
    return {task.name: task for task in found if task.name in ("i->t", "it->i")}


@pytest.fixture(scope="module")
def comparison(tasks):
    return compared(tasks, ("centred", 1.0, False), ("after", 0.2, True))


@pytest.fixture(scope="module")
def page(comparison) -> Page:
    return Page(comparison_page(comparison))


def test_the_table_holds_means_and_differences_of_all_rows(comparison):
    text = to_text(comparison)
    assert "i->t (25 queries, 75 candidates)" in text
    for row in comparison.rows:
        for task in (*comparison.tasks, None):
            values = (row.mean(m, task) for m in ("hit_rate@1", "hit_rate@5", "ndcg@5"))
            cells = "".join(f"{100 * value:9.1f}" for value in values)
            assert any(line.split()[0] == row.name and cells in line for line in text.splitlines())
    against, _ = comparison.against_base(comparison.rows[2], "hit_rate@1")
    overall = text.split("after against before (needs pairs)")[1].split("overall")[1].split("\n")[0]
    d = against.difference
    assert f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" in overall
    assert overall.split()[-4:] == [
        p_text(against.p),
        *(str(n) for n in (against.tally.won, against.tally.lost, against.tally.tied)),
    ]
    assert "after: 20 items encoded, 5.0 a second" in text
    assert "centred: " not in text  # what has no costs of its own


def test_columns_of_a_large_k_stay_apart(tasks):
    comparison = compared({"i->t": tasks["i->t"]}, ("after", 0.2, True))
    rows = []
    for row in comparison.rows:
        trials = {
            t: replace(trial, metrics={f"{m}000": x for m, x in trial.metrics.items() if "@" in m})
            for t, trial in row.trials.items()
        }
        rows.append(replace(row, trials=trials))
    settings = Settings(cutoffs=(1000, 5000))
    text = to_text(Comparison(comparison.tasks, tuple(rows), settings))
    assert text.splitlines()[0].split() == ["R@1000", "R@5000", "nDCG@5000"]
    assert any(line.split()[0] == "nDCG@5000" for line in text.splitlines()[1:] if line.strip())


def test_of_one_model_there_is_nothing_to_compare(tasks):
    text = to_text(compared({"i->t": tasks["i->t"]}))
    assert "against" not in text and "overall" not in text and "difference" not in text


def test_json_names_what_computed_it(comparison):
    found = to_json(comparison)
    assert {"python", "patch-retriever", "torch", "sentence-transformers"} <= set(found["versions"])
    assert [row["name"] for row in found["rows"]] == ["before", "centred", "after"]


@pytest.mark.parametrize(
    ("metric", "said"),
    [("hit_rate@5", "R@5"), ("ndcg@10", "nDCG@10"), ("recall@5", "recall@5"), ("map", "MAP")],
)
def test_hit_rates_are_called_r_at_k_and_recall_recall(metric, said):
    assert metric_name(metric) == said


def test_the_page_has_its_parts_and_no_network(page):
    assert [s["id"] for s in page.all("section")] == [
        "means", "differences", "geometry", "costs", "gallery",
    ]  # fmt: skip
    assert page.all("script") == []
    assert all(i["src"].startswith("data:image/") for i in page.all("img"))
    assert len(page.all("figure", **{"class": "plot"})) == 3
    assert "after" in page.text and "centred" in page.text


def test_the_gallery_is_of_models_alone_and_counts_queries(page, comparison):
    before, after = (comparison.rows[i].trials["i->t"].first_q for i in (0, 2))
    won, lost = ((after == 1) & (before != 1)).sum(), ((after != 1) & (before == 1)).sum()
    assert won > 0
    assert f"i->t: {won} won, {lost} lost of 25" in page.text
    assert page.text.count(" lost of 25") == 2  # two tasks of one model, none of a baseline
    examples = len(page.all("article", **{"class": "example"}))
    assert 0 < examples <= 8


@pytest.mark.filterwarnings("error")
def test_texts_and_names_are_escaped(tasks):
    task = tasks["i->t"]
    wild = replace(
        task, candidates=tuple(Item(f"{item.text} {ATTACK}") for item in task.candidates)
    )
    text = comparison_page(compared({ATTACK: wild}, (f"$x{ATTACK}", 0.2, True)))
    page = Page(text)
    assert page.all("script") == []
    assert all(i["src"].startswith("data:") for i in page.all("img"))
    assert ATTACK in page.text


def test_a_page_of_one_model_and_task_has_no_differences(tasks):
    page = Page(comparison_page(compared({"i->t": tasks["i->t"]})))
    assert [s["id"] for s in page.all("section")] == ["means", "geometry", "costs"]


def test_what_cannot_be_said_of_so_few_is_a_dash(tasks):
    task = tasks["i->t"]
    one = replace(
        task,
        query_ids=task.query_ids[:1],
        queries=task.queries[:1],
        candidate_ids=["elsewhere"],
        candidates=task.candidates[:1],
        qrels={task.query_ids[0]: {"elsewhere": 1}},
    )
    found = compared({"one": one})
    assert found.base.trials["one"].figures["geometry"]["uniformity"] is None
    json.dumps(to_json(found), allow_nan=False)
    assert "–" in Page(comparison_page(found)).text


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window(browser, tasks, tmp_path, width):
    task = tasks["i->t"]
    long = replace(task, candidates=tuple(Item(f"{c.text} {ENDLESS}") for c in task.candidates))
    path = tmp_path / "page.html"
    found = compared({"i->t": long, "it->i": tasks["it->i"]}, ("after", 0.2, True))
    path.write_text(comparison_page(found), encoding="utf-8")
    seen, wrong, asked = looked_at(browser, path, width, "light")
    assert wrong == []
    assert set(asked) <= {"file", "data"}
    assert seen["missing"] == 0
    assert seen["width"] <= seen["window"] == width
    assert seen["outside"] == []
