"""Another row for export: found by its id, refused in one line, exported like the chosen one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from commands import error_line, invoke
from conftest import SMALL_SCENES
from patch_retriever import PatchedRetriever, build_retriever
from patch_retriever.config import BuildConfig
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import Patch
from patch_retriever.retrieval.evaluate import evaluate_embeddings
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.runs import MARKER
from patch_retriever.scenes.tasks import scenes_collection
from patch_retriever.stages.picking import CONCEPTS, find


def row(name, score, concepts=0, control_of=None):
    tried = [
        {"setting": {"n": 1}, "validation_score": score, "concepts": concepts},
        {"setting": {"n": 2}, "validation_score": score - 0.1, "concepts": 5},
    ]
    return {
        "id": name,
        "control_of": control_of,
        "setting": {"n": 1},
        "validation_score": score,
        "tried": tried,
    }


SELECTIONS = [
    {
        "methods": [
            row("base", 0.5),
            row("cca", 0.9),
            row("gains", 0.7, 3),
            row("gains-random", 0.95, 3, "gains"),
            row("removed", 0.6, 9),
        ],
        "left_out": [{"id": "leace", "title": "LEACE", "why": "one kind"}],
    },
    {"methods": [row("adapter", 0.8), row("adapter-then-gains", 0.85, 2)], "left_out": []},
]


def test_a_row_is_found_by_its_id_in_either_fit():
    assert find(SELECTIONS, "cca") == (0, SELECTIONS[0]["methods"][1])
    assert find(SELECTIONS, "adapter-then-gains") == (1, SELECTIONS[1]["methods"][1])


def test_concepts_is_the_best_row_that_subtracts_some_in_its_setting_and_no_control():
    assert find(SELECTIONS[:1], CONCEPTS)[1]["id"] == "gains"
    assert find(SELECTIONS, CONCEPTS)[1]["id"] == "adapter-then-gains"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("CCA", "no such row; there are base, cca, gains, removed, adapter, adapter-then-gains, "),
        ("gains-random", "a control of gains"),
        ("leace", "left out of this build (one kind)"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line(method, said):
    with pytest.raises(UserError, match=f"--method {method}: ") as refused:
        find(SELECTIONS, method)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_where_nothing_subtracts_concepts_the_reason_is_said():
    selection = {
        "methods": [row("base", 0.5), row("cca", 0.9)],
        "left_out": [{"id": "gains", "title": "gains", "why": "a bad SAE"}],
    }
    with pytest.raises(UserError, match=r"no row subtracts concepts \(a bad SAE\)"):
        find([selection], CONCEPTS)


# the command


def chosen_id(build):
    return json.loads((build / "report/selection.json").read_text())["exported_id"]


def with_concepts(build):
    """The best row with concepts that is not the chosen one."""
    methods = json.loads((build / "report/selection.json").read_text())["methods"]
    found = [
        one
        for one in methods
        if one["control_of"] is None and one["id"] != chosen_id(build)
        for tried in one["tried"]
        if tried["setting"] == one["setting"] and tried["concepts"]
    ]
    return max(found, key=lambda one: one["validation_score"])["id"]


@pytest.fixture(scope="module")
def other(finished_build, tmp_path_factory):
    """An export of another row by the command in a fresh process."""
    out = tmp_path_factory.mktemp("exported") / "other"
    command = [sys.executable, "-m", "patch_retriever", "export", str(finished_build)]
    command += ["--method", with_concepts(finished_build), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done


ITEMS = [item.load() for item in scenes_collection("test", 20, 0).items[::25]]


def test_the_export_loads_plainly_and_equals_the_live_model(other):
    from sentence_transformers import SentenceTransformer

    out, _ = other
    live = PatchedRetriever.from_folder(out)
    assert live.patch.strengths
    model = SentenceTransformer(str(out), device="cpu")
    for encode in ("encode_query", "encode_document"):
        found, expected = (getattr(one, encode)(ITEMS) for one in (model, live))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    golden = json.loads((out / "golden/result.json").read_text())
    assert golden["max_abs_diff"] <= 1e-5


def test_nothing_expensive_is_done_again_and_the_run_stays_as_it_is(other, finished_build):
    out, done = other
    for stage in ("data", "readout", "collect", "sae", "features", "score", "select", "test"):
        assert f"{stage}: done before" in done.stderr, stage
    for stage in ("pick", "export", "evaluate", "report"):
        assert f"{stage}: done before" not in done.stderr
    assert chosen_id(out) == chosen_id(finished_build)
    assert not (finished_build / "run/pick").exists()
    old = Patch.load(finished_build / "patch").about
    assert old["id"] == chosen_id(finished_build)
    assert "picked_instead_of" not in old


def test_card_table_and_report_name_what_was_picked_and_what_would_have_been_chosen(other):
    out, done = other
    about = Patch.load(out / "patch").about
    table = json.loads((out / "report/table.json").read_text())
    assert table["exported_id"] == about["id"] != table["choice"]["id"]
    rows = {one["id"]: one for one in table["rows"]}
    would = rows[table["choice"]["id"]]["method"]
    assert about["picked_instead_of"] == would
    card = (out / "README.md").read_text()
    assert "picked by its id" in card and would in card
    text = (out / "report/table.txt").read_text()
    assert f"> {about['method']}" in text and f"* {would}" in text
    assert text in done.stdout
    page = (out / "report/report.html").read_text()
    assert "<dt>Picked</dt>" in page and would in page
    assert BuildConfig.read(out / MARKER).method == about["id"]


def test_concepts_is_taken_by_the_command_and_remembered(finished_build, tmp_path):
    done = invoke("export", finished_build, "--method", CONCEPTS, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert Patch.load(tmp_path / "out/patch").strengths
    assert BuildConfig.read(tmp_path / "out" / MARKER).method == CONCEPTS


def test_the_row_of_the_table_is_what_the_export_reaches(other):
    """Independently: the folder's embeddings of the test items, searched."""
    out, _ = other
    table = json.loads((out / "report/table.json").read_text())
    collection = scenes_collection("test", SMALL_SCENES["test"], 0)
    encoder = load_encoder(str(out))
    sides = [encoder.embed(collection.items, role) for role in ("query", "document")]
    score = evaluate_embeddings(*sides, collection).score
    (found,) = (r["test_score"] for r in table["rows"] if r["id"] == table["exported_id"])
    assert found == pytest.approx(score, abs=2e-3)


def test_build_with_method_in_place_and_back_again(finished_build, tmp_path):
    out = shutil.copytree(finished_build, tmp_path / "out")
    config = BuildConfig.read(out / MARKER)
    result = build_retriever(out, config.model_copy(update={"method": "realign-role"}))
    assert result.report["exported_id"] == "realign-role"
    assert Patch.load(out / "patch").about["id"] == "realign-role"
    build_retriever(out, config)
    for name in ("patch/patch.json", "report/table.txt", "README.md", "modules.json"):
        assert (out / name).read_bytes() == (finished_build / name).read_bytes(), name


def test_an_unknown_id_is_refused_before_anything_is_written(finished_build, tmp_path):
    said = error_line(
        invoke("export", finished_build, "--method", "nothing", "-o", tmp_path / "out")
    )
    assert said.startswith("--method nothing: no such row; there are base, centre-all, ")
    assert not (tmp_path / "out").exists()


def test_what_no_build_made_is_refused(tmp_path):
    said = error_line(invoke("export", tmp_path / "no", "--method", "cca", "-o", tmp_path / "out"))
    assert "no such folder" in said


def test_choices_do_not_depend_on_titles(finished_build, tmp_path, monkeypatch):
    """All titles renamed: the same method is chosen, and the same rows stand in the table."""
    from dataclasses import replace

    out = shutil.copytree(finished_build, tmp_path / "out")
    config = BuildConfig.read(out / MARKER)
    for stage in ("select", "test", "evaluate"):  # titles are no part of their keys
        shutil.rmtree(out / "run" / stage)

    def renamed(c):
        for number, method in enumerate(METHODS(c)):
            yield replace(method, title=f"row {number}")

    from patch_retriever import build as module

    METHODS = module.methods
    monkeypatch.setattr(module, "methods", renamed)
    result = build_retriever(out, config)
    before = json.loads((finished_build / "report/table.json").read_text())
    assert result.report["exported_id"] == before["exported_id"]
    assert result.report["choice"]["id"] == before["choice"]["id"]
    assert [r["id"] for r in result.report["rows"]] == [r["id"] for r in before["rows"]]
    assert [r["test_score"] for r in result.report["rows"]] == [
        r["test_score"] for r in before["rows"]
    ]
    titles = {r["method"] for r in result.report["rows"]}
    assert not titles & {r["method"] for r in before["rows"] if r["id"] not in FIXED}


FIXED = ("base-paper", "reconstructed")
"""Rows that no method makes."""
