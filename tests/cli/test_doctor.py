"""`doctor`: what is installed, and a first look at a model."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest

from commands import error_line, invoke


def test_without_a_model_it_checks_the_installation_alone():
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("patch-retriever ")
    assert lines[-2].startswith("  built-in model: ")
    assert lines[-1] == "all well"
    assert re.search(r"^  torch \d", result.stdout, re.MULTILINE)


def test_a_missing_package_is_a_problem_and_exit_code_1(monkeypatch):
    module = importlib.import_module("patch_retriever.cli.doctor")
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "PROBLEM no-such-package is not installed: pip install no-such-package" in result.stdout
    assert result.stdout.splitlines()[-1] == "1 problems"
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["problems"] == ["no-such-package is not installed: pip install no-such-package"]


@pytest.fixture(scope="module")
def shown(random_model):
    """What a process of its own prints of a model."""
    command = [sys.executable, "-m", "patch_retriever", "doctor", str(random_model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_has_a_row_for_every_site(shown, random_model):
    installation, model = shown.split("\n\n")
    assert installation.splitlines()[-1] == "all well"
    items, images, head, *rows = model.splitlines()
    assert items.startswith(f"{random_model}: items 8 text, 8 image, 8 both; tokens 576 image")
    assert images == "36 image tokens an item with images"
    assert head.split()[0] == "site"
    assert [row.split()[0] for row in rows] == [
        "layers.0",
        "layers.1",
        "layers.2",
        "last_hidden_state",
    ]
    assert all(len(row) <= 100 for row in rows)


def test_json_holds_the_installation_and_the_model(shown, random_model):
    result = invoke("doctor", random_model, "--json", "--batch-size", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["problems"] == []
    model = found["model"]
    assert model["name"] == str(random_model)
    assert model["image_tokens"] == [36, 36]
    for site, one in model["sites"].items():
        (row,) = (line for line in shown.splitlines() if line.startswith(f"{site} "))
        assert float(row.split()[2].replace(",", "")) == pytest.approx(
            one["largest_norm"], rel=1e-3
        )


def test_pairs_of_ones_own_are_looked_at(random_model, photo_folder):
    result = invoke("doctor", random_model, "--pairs", photo_folder / "pairs.jsonl", "--json")
    assert json.loads(result.stdout)["model"]["items"] == {"text": 8, "image": 8, "both": 8}


def test_a_wrong_model_or_wrong_pairs_are_one_line(random_model, tmp_path):
    def line(*args):
        result = invoke("doctor", *args)
        assert result.exit_code == 2
        (found,) = result.stderr.splitlines()
        return found

    assert line(tmp_path / "gone").startswith(f"Error: {tmp_path}/gone: no such folder")
    assert line(random_model, "--pairs", tmp_path / "gone").startswith(f"Error: {tmp_path}/gone")
    damaged = shutil.copytree(random_model, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    assert line(damaged).endswith("config.json: damaged (not JSON)")
    assert error_line(invoke("doctor", tmp_path / "gone", "--json")).startswith(str(tmp_path))
