"""The benchmark of concept scores: its quick size, and the line of figures."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "scoring.py"


def run(*options):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--threads", "1", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_ends_with_its_figures():
    lines = run()
    figures = json.loads(lines[-1])
    assert "| hard negatives |" in "".join(lines)
    assert figures["settings"]["concepts"] == 4096
    assert figures["hard_negatives"] == 2 * 5 * figures["pairs"]
    seconds = figures["seconds"]
    assert 0 < seconds["scores"] < seconds["all"] < 60
    assert figures["before_gib"] <= figures["peak_gib"] < 3
    assert figures["avoided_gib"]["M = D D^T (concepts x concepts)"] == 4096**2 * 4 / 2**30
    assert {"cpu", "torch", "threads"} <= set(figures)


def test_with_json_its_figures_are_all():
    (line,) = run("--json")
    assert json.loads(line)["settings"]["quick"]
