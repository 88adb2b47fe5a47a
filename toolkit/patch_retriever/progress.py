"""How long work tells that it goes on: two callables that anyone can pass in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable of a known number of steps, to show its progress."""

Say = Callable[[str], None]
"""Takes a line at the start of every stage."""


def no_progress(steps: Iterable[Any], total: int) -> Iterable[Any]:  # noqa: ARG001
    """Show nothing."""
    return steps


def silent(line: str) -> None:
    """Say nothing."""
