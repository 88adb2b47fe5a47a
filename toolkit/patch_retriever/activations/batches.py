"""Items through the backbone to the tokens at a readout's site, batch by batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import as_read
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.backbones.roles import TokenRoles
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.patch.operators import Subtract
from patch_retriever.probe import Probe
from patch_retriever.progress import Progress, no_progress

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor

    from patch_retriever.activations.kept import KeptTokens


class TokenBatch(NamedTuple):
    """The tokens of a few items, padded."""

    numbers: list[int]
    """Of the items, n."""
    tokens_ntd: Tensor
    mask_nt: Tensor
    """1 where a token is no padding."""
    roles_nt: Tensor | None
    """Role numbers, uint8 on the CPU, where they were asked for."""


def read_batches(
    transformer: Transformer,
    items: Sequence[Item],
    readout: Readout,
    batch_size: int,
    progress: Progress = no_progress,
    layers: Mapping[str, Subtract] | None = None,
    skip: int = 0,
    kept: KeptTokens | None = None,
    with_roles: bool = False,
) -> Generator[TokenBatch]:
    """The tokens of all items at the readout's site, of the model that is patched at `layers`,
    without the first `skip` items in the order of batches; with their roles, which are found token
    by token, if they are wanted.

    What is `kept` comes first and does not go through the model. Sets the inputs of the readout
    now: the probe reads its site, so that the model ends there and keeps no list of all layers.
    """
    transformer = as_read(transformer, replace(readout, site=LAST))
    probe, site = Probe(transformer), readout.site
    roles_of = TokenRoles(transformer) if with_roles else None
    edits = {layer: subtract.on_stream for layer, subtract in (layers or {}).items()}
    usable = kept if kept is not None and kept.is_of(readout) and not layers else None
    known: list[int] = []
    left: Sequence[int] = range(len(items))
    if usable is not None:
        known, left = usable.known(items)

    def read() -> Generator[TokenBatch]:
        seen = 0
        if usable is not None:
            for batch in usable.batches(items, known, batch_size, device_of(transformer)):
                if seen >= skip:
                    yield batch
                seen += len(batch.numbers)
        prepared = item_batches(
            transformer,
            Lazy(left, items.__getitem__),
            batch_size,
            progress,
            skip=max(0, skip - len(known)),
        )
        with closing(prepared) as batches:
            for numbers, features in batches:
                yield TokenBatch(
                    [left[n] for n in numbers],
                    probe.read(features, [site], edits)[site],
                    features["attention_mask"],
                    None if roles_of is None else roles_of(features),
                )

    return read()
