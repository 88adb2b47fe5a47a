"""Which calibration items the methods are fitted on, where there are more than they need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sampled_items(kinds_n: Tensor, pairs: Iterable[Tensor], most: int, seed: int) -> Tensor:
    """Item numbers, ascending: at most `most` of each kind, all where there are no more.

    Random pairs are taken as long as both items find room, so that as many pairs as possible stay
    whole; room that is left goes to random other items.

    Args:
        kinds_n: the kind of every item, as its number in `KINDS`.
        pairs: (query, document) items, (n, 2), of each direction.
        most: the bound.
        seed: of the draw.
    """
    counts_k = torch.bincount(kinds_n.long(), minlength=3)
    if int(counts_k.max()) <= most:
        return torch.arange(len(kinds_n))
    generator = torch.Generator().manual_seed(seed)
    kinds, kept = kinds_n.tolist(), [False] * len(kinds_n)
    room = [most] * len(counts_k)
    pairs_n2 = torch.cat(list(pairs))
    for pair in pairs_n2[torch.randperm(len(pairs_n2), generator=generator)].tolist():
        new = [item for item in set(pair) if not kept[item]]
        if all(room[kinds[item]] >= sum(kinds[i] == kinds[item] for i in new) for item in new):
            for item in new:
                kept[item] = True
                room[kinds[item]] -= 1
    for item in torch.randperm(len(kinds), generator=generator).tolist():
        if not kept[item] and room[kinds[item]]:
            kept[item] = True
            room[kinds[item]] -= 1
    return torch.tensor(kept).nonzero()[:, 0]


def renumbered(numbers_n: Tensor, kept_m: Tensor) -> Tensor:
    """Item numbers as places in `kept_m` (ascending); rows with an item that was not kept are left
    out. Numbers are (n,) or (n, 2)."""
    there_n = torch.isin(numbers_n, kept_m)
    whole_n = there_n if numbers_n.ndim == 1 else there_n.all(1)
    return torch.searchsorted(kept_m, numbers_n[whole_n])
