"""The benchmark of approximate indexes: its figures on a small build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "quantised.py"
SIZES = ["--candidates", "600", "--queries", "30", "--code-bytes", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def said(finished_build):
    """What two runs say, for people and for programs."""
    return [run("--model", str(finished_build), *SIZES, *more) for more in ([], ["--json"])]


def run(*options: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_index_is_measured_for_base_closed_gap_and_patch(said, finished_build):
    figures = json.loads(said[0][-1])
    pools = figures["models"][finished_build.name]
    assert set(pools) == {"captions for pictures", "captions for pictures and captions"}
    for variants in pools.values():
        assert list(variants) == ["base", "base, gap closed", "exported patch"]
        base, closed, _ = variants.values()
        assert len(base["indexes"]) == len(closed["indexes"]) == 9
        assert base["indexes"]["SQ8"]["recall_of_exact"] > 0.8
        for name, index in closed["indexes"].items():
            assert 0 <= index["recall_of_exact"] <= 1
            difference = index["recall_minus_base"]
            assert difference["low"] <= difference["mean"] <= difference["high"]
            expected = index["recall_of_exact"] - base["indexes"][name]["recall_of_exact"]
            assert difference["mean"] == pytest.approx(expected)
    assert {"cpu", "torch", "threads"} <= set(figures)
    assert figures["settings"]["candidates"] == 600


def test_centring_closes_the_gap(said):
    (pools,) = json.loads(said[0][-1])["models"].values()
    for base, closed, _ in (variants.values() for variants in pools.values()):
        assert closed["gap"] < base["gap"]


def test_with_json_its_figures_are_all_and_the_same(said):
    (line,) = said[1]
    timeless = [json.loads(lines[-1])["models"] for lines in said]
    for models in timeless:
        for pools in models.values():
            for variants in pools.values():
                for figures in variants.values():
                    figures.pop("exact_ms_a_query")
                    for index in figures["indexes"].values():
                        index.pop("ms_a_query")
    assert timeless[0] == timeless[1]
    assert json.loads(line)["settings"]["k"] == 10
