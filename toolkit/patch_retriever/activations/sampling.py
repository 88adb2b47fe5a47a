"""Which tokens of an item go into the store, where there are more than training will read.

The choice for a token follows from the seed, its item's number and its position alone, so it does
not change with batches, their order or a break.

A store of everything is out of reach for long items: at d 4,096, 100,000 pairs with 1,000 tokens an
image and 50 a text are 105 million tokens of 8 KiB, 860 GB. With 2 million tokens wanted, each of
the 200,000 items keeps 10: 2 million tokens x (2 x 4,096 + 8 bytes) = 16.4 GB, and under mean
pooling 200,000 sums x 4 x 4,096 bytes = 3.3 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from patch_retriever.backbones.roles import ROLES

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1
"""Tokens that an item keeps of every token role that it has, at the least."""
LEAST_OF_ITEM = LEAST * len(ROLES) + 1
"""The smallest budget of an item: every role's least, and the token that a pooling reads alone."""


def tokens_per_item(n_items: int, tokens_wanted: int | None) -> int | None:
    """How many tokens every item may keep, so that a store of `n_items` holds about `tokens_wanted`
    and never more than max(tokens_wanted + n_items, LEAST_OF_ITEM x n_items); None for all.

    Items that are shorter leave room unused: training reads a store several times.
    """
    if tokens_wanted is None:
        return None
    return max(LEAST_OF_ITEM, -(-tokens_wanted // max(1, n_items)))


@dataclass(frozen=True)
class Sampler:
    """Keeps up to `per_item` tokens of every item; None: all."""

    per_item: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_item is not None and self.per_item < LEAST_OF_ITEM:
            raise ValueError(f"an item keeps {LEAST_OF_ITEM} tokens at the least")

    def keeps(
        self,
        items_t: Tensor,
        positions_t: Tensor,
        roles_t: Tensor,
        pooled_t: Tensor,
        sink_t: Tensor,
    ) -> Tensor | None:
        """Which tokens are kept, bool (t,) on the CPU; None where all of any item are.

        An item of more tokens than its budget keeps of each token role a share in proportion, and
        `LEAST` of them at the least, by the order of a hash (a reservoir of known length); of its
        sinks none. A token that the pooling reads alone (the last one, say) is always kept. All
        tokens of an item have to be given at once.
        """
        if self.per_item is None:
            return None
        item_t, *columns = (
            values.cpu().numpy()
            for values in (items_t, positions_t, roles_t, pooled_t.bool(), sink_t.bool())
        )
        columns[0] = _hashed(self.seed, item_t, columns[0])
        kept_t = np.ones(len(item_t), bool)
        for item in np.unique(item_t):
            (tokens_i,) = (item_t == item).nonzero()
            if len(tokens_i) > self.per_item:
                kept_t[tokens_i] = self._of_item(*(column[tokens_i] for column in columns))
        return torch.from_numpy(kept_t)

    def _of_item(
        self, rank_i: np.ndarray, roles_i: np.ndarray, pooled_i: np.ndarray, sink_i: np.ndarray
    ) -> np.ndarray:
        """Which tokens of one item are kept."""
        assert self.per_item is not None
        kept_i = pooled_i & (pooled_i.sum() == 1)
        free_i = ~sink_i & ~kept_i
        counts_r = np.bincount(roles_i[free_i], minlength=len(ROLES))
        for role, quota in enumerate(quotas(counts_r, self.per_item - int(kept_i.sum()))):
            (of_role,) = (free_i & (roles_i == role)).nonzero()
            kept_i[of_role[rank_i[of_role].argsort(kind="stable")[:quota]]] = True
        return kept_i


def quotas(counts_r: np.ndarray, budget: int) -> np.ndarray:
    """How many of each role's tokens to keep, (r,): `LEAST` of each, the rest of the budget in
    proportion to what is left of them (largest remainders), never more than there are."""
    least_r = np.minimum(counts_r, LEAST)
    left_r, budget = counts_r - least_r, budget - int(least_r.sum())
    if left_r.sum() <= budget:
        return counts_r
    exact_r = left_r * budget / left_r.sum()
    more_r = np.floor(exact_r).astype(int)
    by_remainder = np.argsort(more_r - exact_r, kind="stable")
    more_r[by_remainder[: budget - int(more_r.sum())]] += 1
    return least_r + more_r


def _hashed(seed: int, items_t: np.ndarray, positions_t: np.ndarray) -> np.ndarray:
    """A number of 64 bits for every token, from the seed, its item and its position."""
    mixed = _mixed(np.array([seed], np.uint64))
    return _mixed(_mixed(mixed + items_t.astype(np.uint64)) + positions_t.astype(np.uint64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014): no pattern in the numbers survives."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
