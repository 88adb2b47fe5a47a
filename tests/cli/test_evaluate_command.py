"""`patch-retriever evaluate`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from commands import error_line, invoke

ONLY = ("--n", 8, "--only", "i->i", "--only", "t->i short")


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "patch_retriever", "evaluate", *map(str, args)]


def started(folder) -> bool:
    return any((folder / "queries").glob("*.parquet"))


@pytest.fixture(scope="module")
def killed(finished_build, tmp_path_factory):
    """An evaluation in a process of its own, killed after its first trial, and what it left."""
    out = tmp_path_factory.mktemp("compared") / "out"
    args = (finished_build, "--against", f"{finished_build}@base", *ONLY, "--baselines", "-o", out)
    with subprocess.Popen(command(*args), stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not started(out) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
    left = {p: p.stat().st_mtime_ns for p in (out / "queries").glob("*.parquet")}
    return out, args, left


@pytest.fixture(scope="module")
def again(killed):
    """The same command again, in a fresh process."""
    _, args, _ = killed
    return subprocess.run(command(*args, "--json"), capture_output=True, text=True, check=True)


def test_a_killed_evaluation_goes_on_where_it_was(killed, again):
    out, _, left = killed
    assert left
    report = json.loads(again.stdout)
    files = [task["file"] for row in report["rows"] for task in row["tasks"].values()]
    assert len(files) == len(set(files)) == 2 * 6
    assert {p: p.stat().st_mtime_ns for p in left} == left
    assert {p.name for p in (out / "queries").iterdir()} == set(files)


def test_the_folder_holds_page_figures_and_every_querys_scores(killed, again):
    out, _, _ = killed
    report = json.loads(again.stdout)
    assert json.loads((out / "comparison.json").read_text()) == report
    assert (out / "comparison.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    row = report["rows"][-1]
    assert (report["base"], row["name"]) == ("out@base", "out")
    for task in row["tasks"].values():
        table = pq.read_table(out / "queries" / task["file"])
        assert table.num_rows == 8
        for metric, mean in task["metrics"].items():
            assert sum(table[metric].to_pylist()) / 8 == pytest.approx(mean)
    assert report["settings"]["cutoffs"] == [1, 5, 10]
    assert len(report["rows"]) == 6


def test_nothing_is_said_on_stdout_but_json(again):
    assert again.stderr == ""


def test_without_a_folder_nothing_is_left_behind(finished_build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("evaluate", finished_build, "--n", 4, "--only", "i->i", "--k", "3,1")
    assert result.exit_code == 0, result.stderr
    assert "R@1      R@3   nDCG@3" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_page_alone_and_a_cache_elsewhere(finished_build, photo_folder, tmp_path):
    page, cache = tmp_path / "page.html", tmp_path / "cache"
    args = ("evaluate", finished_build, "--task", photo_folder / "pairs.jsonl", "--only", "i->t")
    for _ in range(2):
        result = invoke(*args, "--html", page, "--cache", cache, "--limit", 5)
        assert result.exit_code == 0, result.stderr
    assert "i->t (5 queries, 18 candidates)" in result.stdout
    assert "nothing to encode" in result.stdout
    assert page.is_file()


@pytest.mark.parametrize("factory", ["nonsense", "PQ7", "IVF9999,Flat"])
def test_an_index_that_cannot_be_made_is_refused_before_anything_is_encoded(
    finished_build, tmp_path, factory
):
    cache = tmp_path / "cache"
    args = ("evaluate", finished_build, "--n", 5, "--index", factory, "--cache", cache)
    assert error_line(invoke(*args)).startswith(f"index {factory!r}")
    assert not cache.exists()


def test_a_file_in_the_place_of_a_folder_is_refused(finished_build, tmp_path):
    (tmp_path / "a").touch()
    for option in ("-o", "--cache"):
        line = error_line(invoke("evaluate", finished_build, option, tmp_path / "a"))
        assert "is a file" in line
