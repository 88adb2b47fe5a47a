"""The benchmark of search: its quick size, and the line of figures."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "search.py"


def test_it_ends_with_its_figures(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert "| bare FAISS" in "".join(text)
    assert figures["settings"]["candidates"] == 40_000
    assert figures["same"] == 1
    assert 0 < figures["ratio"] < 10
    assert len(figures["ours"]["all"]) == len(figures["bare"]["all"]) == 3
    sizes = {(b["candidates"], b["files"]): b for b in figures["builds"]}
    quarter, whole = sizes[10_000, 1], sizes[40_000, 1]
    assert whole["index_mib"] > 3.9 * quarter["index_mib"]
    # beyond the index, four times the vectors take no more: far less than the 29 MiB they are
    assert whole["beyond_mib"] < quarter["beyond_mib"] + 15
    assert sizes[40_000, 8]["peak_mib"] < whole["peak_mib"]
    assert {"cpu", "threads", "goal", "goal_met"} <= set(figures)
    assert list(tmp_path.iterdir()) == []
