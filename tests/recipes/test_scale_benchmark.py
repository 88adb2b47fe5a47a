"""The benchmark of a build's plan: its quick size, and the line of figures."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "scale.py"


def test_it_ends_with_its_figures():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    figures = json.loads(lines[-1])
    stages = [one["stage"] for one in figures["figures"]]
    assert stages == ["collect", "sae", "features", "score", "select", "evaluate"]
    written = {one["stage"]: one for one in figures["figures"]}
    for name in ("collect", "features", "sae"):
        found, planned = written[name]["disk_bytes"], written[name]["planned_disk_bytes"]
        assert 0.9 < found / planned < 1.3
    assert figures["plan_of_7b"]["memory_bytes"] < 64e9
    assert figures["plan_of_7b"]["disk_bytes"] < 100e9
    assert {"cpu", "torch", "threads"} <= set(figures)
