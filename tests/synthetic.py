"""Activations that are made here: sparse mixtures of directions, in a store or in memory."""

from __future__ import annotations

import torch

from patch_retriever.activations.store import Store
from patch_retriever.activations.stream import Block
from patch_retriever.activations.writer import StoreWriter


def directions(n, d, seed=0):
    """Random unit rows (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def mixtures(n, n_directions, active, seed=0):
    """Codes (n, directions), each with a few active ones of strength 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, n_directions, generator=generator).topk(active).indices
    strength = 1 + torch.rand(n, active, generator=generator)
    return torch.zeros(n, n_directions).scatter_(1, order, strength)


def sparse_tokens(n=4000, d=16, active=3, n_directions=24, seed=0):
    """Each token is a sum of a few directions; they are exact in bf16, as a store holds them."""
    tokens_td = mixtures(n, n_directions, active, seed) @ directions(n_directions, d)
    return tokens_td.bfloat16().float()


def clustered_tokens(n=4000, d=32, seed=0):
    """Sparse tokens around three far points, where many concepts never get a chance to fire."""
    generator = torch.Generator().manual_seed(seed)
    points_pd = 2 * torch.randn(3, d, generator=generator)
    tokens_td = sparse_tokens(n, d, 4, 64, seed)
    return tokens_td + points_pd[torch.randint(0, 3, (n,), generator=generator)]


def write_store(
    folder,
    tokens_td,
    roles_t=None,
    pooled_t=None,
    items_t=None,
    pairs=None,
    tokens_per_shard=1000,
    at_once=100,
):
    """A finished store; by default every ten tokens are an item, and pooling reads its last."""
    n = len(tokens_td)
    roles_t = torch.zeros(n) if roles_t is None else roles_t
    pooled_t = torch.arange(n) % 10 == 9 if pooled_t is None else pooled_t
    items_t = torch.arange(n) // 10 if items_t is None else items_t
    writer = StoreWriter(folder, tokens_per_shard)
    for i in range(0, n, at_once):
        part = slice(i, i + at_once)
        writer.add(tokens_td[part], roles_t[part], pooled_t[part], items_t[part])
    writer.close(pairs)
    return Store(folder)


class MemorySource:
    """A source of blocks in memory; the last tokens are held out."""

    def __init__(self, tokens_td, block=1000, held_out=400, pooled_t=None, roles_t=None):
        n = len(tokens_td) - held_out
        self.pooled_t = torch.zeros(n, dtype=torch.bool) if pooled_t is None else pooled_t[:n]
        roles_t = torch.zeros(len(tokens_td), dtype=torch.uint8) if roles_t is None else roles_t
        self.training_td, self.held_out_td = tokens_td[:n].bfloat16(), tokens_td[n:]
        self.held_out_roles_t = roles_t[n:]
        self.starts = range(0, n, block)
        self.block, self.n_tokens = block, n

    def epoch(self, generator):
        return [[i] for i in torch.randperm(len(self.starts), generator=generator).tolist()]

    def read(self, block):
        rows = slice(self.starts[block[0]], self.starts[block[0]] + self.block)
        return Block(self.training_td[rows], self.pooled_t[rows])

    def held_out(self, tokens):
        return self.held_out_td[:tokens], self.held_out_roles_t[:tokens]
