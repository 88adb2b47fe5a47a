"""The architectures, by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from patch_retriever.errors import UserError, first_line
from patch_retriever.sae.architectures.base import Architecture
from patch_retriever.sae.architectures.batch_topk import BatchTopK, Matryoshka
from patch_retriever.sae.architectures.jumprelu import JumpReLU
from patch_retriever.sae.architectures.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    architecture.name: architecture for architecture in (TopK, BatchTopK, Matryoshka, JumpReLU)
}
"""Add a class here to train it by its name."""


def make_architecture(name: str, k: int, **options: Any) -> Architecture:
    """The architecture of this name.

    Raises:
        UserError: no such architecture, or an option that it doesn't have.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"architecture {name!r}: unknown; there are {', '.join(ARCHITECTURES)}")
    known = [field.name for field in fields(ARCHITECTURES[name]) if field.name != "k"]
    for option in options:
        if option not in known:
            raise UserError(
                f"architecture {name}: no option {option!r}; it has {', '.join(known) or 'none'}"
            )
    try:
        return ARCHITECTURES[name](k, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise UserError(f"architecture {name}: {given}: {first_line(error)}") from None
