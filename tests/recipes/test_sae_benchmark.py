"""The benchmark of a training step: its figures, and that no peer is dropped in silence."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "sae_training.py"


def run(*options):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_measures_ours_and_names_every_peer_that_it_could_not_start(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module at all' >&2; exit 3\n")
    broken.chmod(0o755)
    options = ["--quick", "--json", "--steps", "16", "--threads", "1"]
    lines = run(*options, "--peers", f"sparsify={broken}").splitlines()

    assert len(lines) == 1
    figures = json.loads(lines[0])
    result = figures["sizes"]["quick"]
    assert result["failed"]["sparsify"] == "no module at all"
    assert "--environments" in result["failed"]["SAELens"]
    assert {"sparsify, bfloat16", "dictionary_learning", "overcomplete"} <= set(result["failed"])
    assert result["fastest_peer"] is None
    ours, floor = result["rows"]["ours"], result["rows"]["floor, bfloat16"]
    assert ours["times_ours"] == 1
    assert ours["steps_timed"] == 8  # the first turn isn't counted
    assert 0 < ours["fvu"] < 1
    assert 0 < ours["l0"] <= 16
    assert ours["peak_mib"] >= ours["before_mib"]
    assert "fvu" not in floor
