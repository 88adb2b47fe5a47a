"""Items read ahead of what is done with them; a bad one does not stop those after it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from patch_retriever.ahead import made_ahead
from patch_retriever.backbones.inputs import item_in_memory
from patch_retriever.errors import UserError
from patch_retriever.items import Item

T = TypeVar("T")


def read_items(
    items: Sequence[Item], look: Callable[[Item], T], workers: int, ahead: int | None = None
) -> Generator[T | UserError]:
    """`look` of every item in their order, with its pictures' bytes in memory; or why it cannot be
    read, which `look` may raise, too.

    One thread reads, `ahead` items at most, since files with many pictures in them are read
    forwards; `workers` look.
    """

    def read(number: int) -> Item | UserError:
        try:
            return item_in_memory(items[number])
        except UserError as error:
            return error

    def looked(found: Item | UserError) -> T | UserError:
        if isinstance(found, UserError):
            return found
        try:
            return look(found)
        except UserError as error:
            return error

    return made_ahead(looked, made_ahead(read, range(len(items)), ahead=ahead), workers)
