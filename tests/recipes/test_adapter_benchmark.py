"""The benchmark of training through a patch: its quick size, and the line of figures."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "adapter_training.py"


def test_it_ends_with_its_figures():
    quick = ["--quick", "--threads", "1", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *quick], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    ways = ["without", "with", "all losses", "checkpointing", "sentence-transformers"]
    assert list(figures["seconds"]) == list(figures["peak_mib"]) == ways
    assert all(seconds > 0 for seconds in figures["seconds"].values())
    assert {"time, with / without", "memory, with / without"} <= set(figures["ratios"])
    assert {"cpu", "threads", "versions", "settings", "goals_met"} <= set(figures)
