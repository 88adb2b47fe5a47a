"""How a reader of retrieval tasks reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ReadOptions:
    """What a user may choose about a task, whatever its format."""

    split: str = "test"
    """Which split; of pairs also `all`, for those that are there for testing only."""
    images: Path | None = None
    """Where relative picture paths start; None: beside the file that names them."""
    pool: Literal["local", "union"] = "local"
    """M-BEIR: a task's own candidates, or those of all its tasks together."""
    limit: int | None = None
    """At most so many queries of a task; the candidates stay."""
    skip_bad: bool = False
    """Leave bad rows and pictures out and count them, instead of stopping at the first."""
    allow_urls: bool = False
    """Download pictures that are named by an address."""
    seed: int = 0
    """Of how pairs are split and of what the built-in world shows."""
    n: int = 500
    """Scenes asked about, of the built-in world."""
