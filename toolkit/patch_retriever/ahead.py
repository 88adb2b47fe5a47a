"""Work that threads do before it is asked for, in order and with a bound."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

S = TypeVar("S")
T = TypeVar("T")

WORKERS = min(4, os.cpu_count() or 1)
"""Threads that prepare what a model reads, unless told otherwise."""


def made_ahead(
    make: Callable[[S], T], inputs: Iterable[S], workers: int = 1, ahead: int | None = None
) -> Generator[T]:
    """`make` of each input, in their order, by threads; `ahead` of them, or as many as there are
    `workers`, are made or being made while one is used.

    Inputs are drawn in the thread that reads. An error comes after what was made before it,
    whether a thread raised it or the inputs did. Closing this waits for what is being made, so
    that nothing of it runs beside what comes next.
    """
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[T]] = deque()
    drawn = iter(inputs)
    error: Exception | None = None
    more = True
    with ThreadPoolExecutor(workers, "ahead") as threads:
        try:
            while more or waiting:
                while more and len(waiting) <= (ahead or workers):
                    try:
                        waiting.append(threads.submit(make, next(drawn)))
                    except StopIteration:
                        more = False
                    except Exception as raised:
                        more, error = False, raised
                if waiting:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            if isinstance(drawn, Generator):  # it may have threads of its own
                drawn.close()
    if error is not None:
        raise error
