"""Pooling: token activations to one vector an item, by weights that are linear in the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patch_retriever.backbones.readout import PoolingMode

if TYPE_CHECKING:
    from torch import Tensor


def pooling_weights(mask_nt: Tensor, pooling: PoolingMode) -> Tensor:
    """The weight of every token in its item's pooled vector, (n, tokens).

    Both poolings are linear in the tokens: that is why codes can be pooled like activations.
    """
    mask_nt = mask_nt.float()
    if pooling == "mean":
        return mask_nt / mask_nt.sum(1, keepdim=True)
    positions_t = torch.arange(1, mask_nt.shape[1] + 1, device=mask_nt.device)
    last_n = (mask_nt * positions_t).argmax(1)
    return torch.nn.functional.one_hot(last_n, mask_nt.shape[1]).float()


def pool(tokens_ntd: Tensor, weights_nt: Tensor) -> Tensor:
    """Pooled vectors (n, d): the tokens' sum, each times its weight."""
    return torch.einsum("nt,ntd->nd", weights_nt, tokens_ntd.float())
