"""The benchmark of encoding: its quick size, and the line of figures."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "encoding.py"


def test_it_ends_with_its_figures(tmp_path):
    quick = ["--quick", "--threads", "1", "--rounds", "1", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *quick], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert "| plain loop" in "".join(text)
    ways = figures["ways"]
    assert list(ways) == ["base", "cut", "export", "live", "official", "plain loop", "ours"]
    for way in ways.values():
        assert len(way["seconds"]) == 1
        assert way["items_per_second"] > 0
        assert way["peak_mib"] > 50
    # the ways that encode without a patch give the same vectors
    assert all(ways[name]["apart"] < 1e-5 for name in ("official", "plain loop", "ours"))
    assert all(ways[name]["apart"] > 1e-2 for name in ("export", "live"))
    others = {"ours / plain loop", "decoder of cut / base"}
    assert set(figures["ratios"]) == {*figures["goals"], *others}
    assert 0.3 < figures["ratios"]["decoder of cut / base"] < 0.8  # half of the layers
    assert figures["parameters"] > 1_000_000
    assert {"cpu", "threads", "goals_met"} <= set(figures)
    assert list(tmp_path.iterdir()) == []
