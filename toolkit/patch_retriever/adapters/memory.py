"""How an adapter's training fits into memory, estimated from a model's shape; and what is said
where it does not."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.adapters.targets import target_modules
from patch_retriever.backbones.families import n_layers
from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

SIZES = (8, 24, 80)
"""GiB of common accelerators."""
SPARE = 0.8
"""Share of the memory that is planned with; the rest is for the runtime and fragmentation."""
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What memory depends on: numbers of parameters and of layers, widths of the residual stream
    and of the MLP, bytes of a number, and numbers that an adapter of rank 1 has."""

    parameters: int
    layers: int
    width: int
    mlp_width: int
    bytes_each: int
    per_rank: int

    @classmethod
    def of(cls, transformer: Transformer, settings: AdapterSettings) -> Shape:
        """A loaded backbone's.

        Raises:
            UserError: no target module was found.
        """
        model: Any = transformer.model
        text = model.config.get_text_config()
        targets = [model.get_submodule(path) for path in target_modules(model, settings)]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=n_layers(model),
            width=text.hidden_size,
            mlp_width=getattr(text, "intermediate_size", 4 * text.hidden_size),
            bytes_each=model.dtype.itemsize,
            per_rank=sum(m.in_features + m.out_features for m in targets),
        )


@dataclass(frozen=True)
class Suggestion:
    """Settings for so much memory, and what they are estimated to take; None where even one item
    with checkpointing does not fit."""

    memory_gib: float
    settings: AdapterSettings | None
    estimate_gib: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        found = self.settings
        return {
            "memory_gib": self.memory_gib,
            "fits": found is not None,
            "estimate_gib": round(self.estimate_gib, 2),
            "chunk_size": found and found.chunk_size,
            "gradient_checkpointing": found and found.gradient_checkpointing,
        }


def estimate_gib(shape: Shape, settings: AdapterSettings, tokens_per_item: int) -> float:
    """GiB of a training: weights; the adapter's weights, gradients and Adam's two moments in
    float32; and the activations of one chunk.

    A decoder layer keeps, for every token, about 32 numbers of the residual stream's width (norms
    in float32, queries, keys, values before and after their rotation, outputs, and what adapters
    read) and 8 of the MLP's, a fused attention assumed: about four times what Korthikanti et al.
    2022 (arXiv 2205.05198, Eq. 1) count for a layer without adapters, and somewhat less than
    `recipes/benchmarks/adapter_training.py` measures on a CPU. With checkpointing a layer keeps its
    input, and one layer at a time all of it.
    """
    rank = 1 if settings.method == "ia3" else settings.rank
    tokens = settings.chunk_size * tokens_per_item
    whole = tokens * shape.bytes_each * (32 * shape.width + 8 * shape.mlp_width)
    kept = shape.layers * whole
    if settings.gradient_checkpointing:
        kept = shape.layers * tokens * shape.bytes_each * shape.width + whole
    adapter = 16 * rank * shape.per_rank
    return (shape.parameters * shape.bytes_each + adapter + kept) / _GIB


def suggest(
    shape: Shape,
    settings: AdapterSettings,
    tokens_per_item: int,
    sizes: Sequence[float] = SIZES,
) -> list[Suggestion]:
    """For every size of memory the largest chunk that fits, without checkpointing where eight items
    do. The chunk changes memory and speed, never the loss."""
    found = []
    for memory in sizes:
        tried = [
            replace(settings, chunk_size=chunk, gradient_checkpointing=checkpointing)
            for checkpointing, least in ((False, 8), (True, 1))
            for chunk in (256, 128, 64, 32, 16, 8, 4, 2, 1)
            if chunk >= least
        ]
        estimates = [(one, estimate_gib(shape, one, tokens_per_item)) for one in tried]
        fits = next(((o, g) for o, g in estimates if g <= SPARE * memory), None)
        settings_found, gib = fits or (None, estimates[-1][1])
        found.append(Suggestion(memory, settings_found, gib))
    return found


@contextmanager
def out_of_memory_said(settings: AdapterSettings) -> Generator[None]:
    """Say in one line what to lower when memory runs out.

    Raises:
        UserError: it did.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not ran_out and "can't allocate memory" not in str(error):
            raise
        further = "" if settings.gradient_checkpointing else ", or turn gradient checkpointing on"
        raise UserError(
            f"out of memory in the adapter's training; lower chunk_size (now "
            f"{settings.chunk_size}; the loss stays the same) or max_pixels{further}"
        ) from None
