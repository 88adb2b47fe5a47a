"""A command that is stopped by a signal says so in a line, leaves nothing half-written, goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import SMALL_SAE, SMALL_SCENES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_stopped_build_says_so_and_can_go_on(number, random_model, tmp_path):
    (tmp_path / "small.yaml").write_text(
        yaml.safe_dump({"scenes": SMALL_SCENES, "sae": SMALL_SAE, "folds": 1})
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "patch_retriever", "build", str(random_model), "-o", str(out)]
    command += ["--config", str(tmp_path / "small.yaml")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(out / "run" / "features", process)
    process.send_signal(number)
    said, error = process.communicate()
    assert process.returncode == 128 + number
    last = error.splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name}: ") and "same command again" in last
    assert "Traceback" not in error and said == ""
    assert not list(out.rglob("*.partial")) and not (out / "modules.json").exists()
    again = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    wait_for(out / "run" / "select", again)
    again.kill()
    _, error = again.communicate()
    assert "readout: done before" in error and "collect: done before" in error


def wait_for(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not folder.is_dir():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
