"""Copies of saved SAEs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from saved import FIXTURES, Saved


@pytest.fixture
def copied(tmp_path):
    """A copy of a fixture, which loads as it is."""

    def copy(case: str) -> Saved:
        saved = Saved(Path(shutil.copytree(FIXTURES / case, tmp_path / case)))
        saved.load()
        return saved

    return copy
