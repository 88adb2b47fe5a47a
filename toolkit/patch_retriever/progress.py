"""How long work tells that it goes on: two callables that anyone can pass in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable of a known number of steps, to show its progress."""

Say = Callable[[str], None]
"""Takes a line at the start of every stage."""


def no_progress(steps: Iterable[Any], total: int) -> Iterable[Any]:  # noqa: ARG001
    """Show nothing."""
    return steps


class Ticks:
    """A progress whose steps are counted by who does them, several at a time."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._steps = iter(progress(range(total), total))

    def tick(self, n: int = 1) -> None:
        """So many more are done."""
        for _ in islice(self._steps, n):
            pass

    def end(self) -> None:
        """All are done."""
        for _ in self._steps:
            pass


def silent(line: str) -> None:
    """Say nothing."""
