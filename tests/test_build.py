"""The main job on a small random model: what it writes, loads and repeats."""

from __future__ import annotations


def test_smoke(finished_build):
    assert (finished_build / "modules.json").is_file()
