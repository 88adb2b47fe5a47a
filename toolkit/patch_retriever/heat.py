"""Activations of chosen concepts on every token of an item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patch_retriever.backbones.inputs import ROLES, TokenRoles, item_batches, pooling_weights
from patch_retriever.backbones.load import set_readout
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.items import Item
from patch_retriever.probe import Probe
from patch_retriever.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


@dataclass(frozen=True)
class TokenHeat:
    """One item's tokens (t, without padding): pieces of text, numbers of roles in `ROLES`, weights
    in the pooled vector, and activations (t, m) of the chosen concepts."""

    tokens: list[str]
    roles_t: Tensor
    weights_t: Tensor
    codes_tm: Tensor

    def patches(self, j: int) -> Tensor | None:
        """The j-th chosen concept on the grid (h, w) of image tokens; None without an image."""
        values_p = self.codes_tm[self.roles_t == ROLES.index("image"), j]
        if not len(values_p):
            return None
        side = isqrt(len(values_p))
        return values_p.reshape(side, side) if side**2 == len(values_p) else values_p[None]


def token_heat(
    transformer: Transformer,
    readout: Readout,
    sae: SparseAutoencoder,
    items: Sequence[Item],
    concepts: Tensor,
    batch_size: int = 64,
) -> list[TokenHeat]:
    """The activations of `concepts` (their numbers, m) on every token of every item."""
    set_readout(transformer, readout)
    probe, roles_of = Probe(transformer), TokenRoles(transformer)
    tokenizer: Any = transformer.tokenizer
    found: dict[int, TokenHeat] = {}
    for numbers, features in item_batches(transformer, items, batch_size):
        tokens_ntd = probe.read(features, [LAST])[LAST].float()
        mask_nt = features["attention_mask"].bool()
        roles_nt = roles_of(features)
        weights_nt = pooling_weights(mask_nt, readout.pooling)
        for row, number in enumerate(numbers):
            mask_t = mask_nt[row]
            found[number] = TokenHeat(
                [tokenizer.decode([i]) for i in features["input_ids"][row, mask_t].tolist()],
                roles_nt[row, mask_t.cpu()],
                weights_nt[row, mask_t].cpu(),
                sae.encode(tokens_ntd[row, mask_t])[:, concepts].cpu(),
            )
    return [found[number] for number in range(len(items))]
