"""Pooling: token activations to one vector an item, by weights that are linear in the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from patch_retriever.backbones.readout import PoolingMode

if TYPE_CHECKING:
    from torch import Tensor


Part = Literal["mean", "lasttoken"]


def parts_of(pooling: PoolingMode) -> tuple[Part, ...]:
    """What a pooled vector is made of, in the order in which it lies there."""
    found: Any = tuple(pooling.split("+"))
    return found


def patched_part(pooling: PoolingMode) -> Part:
    """The part that concepts are subtracted from, and that codes are pooled like: the first."""
    return parts_of(pooling)[0]


def pooling_weights(mask_nt: Tensor, part: Part) -> Tensor:
    """The weight of every token in a part of its item's pooled vector, (n, tokens).

    All are linear in the tokens: that is why codes can be pooled like activations.
    """
    mask_nt = mask_nt.float()
    if part == "mean":
        return mask_nt / mask_nt.sum(1, keepdim=True)
    positions_t = torch.arange(1, mask_nt.shape[1] + 1, device=mask_nt.device)
    last_n = (mask_nt * positions_t).argmax(1)
    return torch.nn.functional.one_hot(last_n, mask_nt.shape[1]).float()


def pool_parts(
    tokens_ntd: Tensor, mask_nt: Tensor, pooling: PoolingMode, raw_ntd: Tensor | None = None
) -> Tensor:
    """Pooled vectors (n, d), or (n, 2 d) of two parts. The second part of two is of the tokens
    before the subtraction, `raw_ntd`, if they are given."""
    first, *others = parts_of(pooling)
    if raw_ntd is None:
        raw_ntd = tokens_ntd
    pooled = [pool(tokens_ntd, pooling_weights(mask_nt, first).to(tokens_ntd.device))]
    pooled += [pool(raw_ntd, pooling_weights(mask_nt, p).to(raw_ntd.device)) for p in others]
    return torch.cat(pooled, dim=1)


def pool(tokens_ntd: Tensor, weights_nt: Tensor) -> Tensor:
    """Pooled vectors (n, d): the tokens' sum, each times its weight."""
    return torch.einsum("nt,ntd->nd", weights_nt, tokens_ntd.float())
