"""What long commands show while they run, all of it on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import click


def quiet_libraries() -> None:
    """No progress bars and load reports of the libraries' own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


class Narrator:
    """Lines with the seconds since the start, and bars where someone watches."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self._started = time.monotonic()

    def say(self, line: str) -> None:
        """One line."""
        if not self.silent:
            click.echo(f"[{time.monotonic() - self._started:6.1f} s] {line}", err=True)

    def progress(self, steps: Iterable[Any], total: int) -> Iterable[Any]:
        """`steps` with a bar, unless silent or not on a terminal."""
        from tqdm import tqdm

        hidden = self.silent or not sys.stderr.isatty()
        return tqdm(steps, total=total, leave=False, disable=hidden, file=sys.stderr)
