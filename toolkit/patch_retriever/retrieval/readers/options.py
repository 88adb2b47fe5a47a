"""What every reader of tasks can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ReadOptions:
    """How to read tasks.

    - `split`: the split of the data.
    - `images`: the folder that paths of pictures are relative to, where the data leave it open.
    - `pool`: candidates of the task alone, or of all tasks of its release.
    - `limit`: at most so many queries.
    - `skip_bad`: leave bad rows out and count them.
    - `allow_urls`: fetch pictures that are named by an address.
    - `seed`, `n`: of the built-in world.
    """

    split: str = "test"
    images: Path | None = None
    pool: Literal["local", "union"] = "local"
    limit: int | None = None
    skip_bad: bool = False
    allow_urls: bool = False
    seed: int = 0
    n: int = 500
