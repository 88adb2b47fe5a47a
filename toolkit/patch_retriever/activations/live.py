"""A backbone as a source of training tokens: nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from patch_retriever.activations.collect import token_batches
from patch_retriever.activations.stream import Block, in_blocks, is_held_out, some_of
from patch_retriever.backbones.readout import Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor


class LiveSource:
    """A backbone as a source of training tokens: every block is computed when it is read.

    Nothing is written to disk, and every epoch runs the backbone again. One item in
    twenty is held out; every process takes its share of the others.
    """

    def __init__(
        self,
        transformer: Transformer,
        items: Sequence[Item],
        readout: Readout,
        batch_size: int = 64,
        items_in_block: int = 1024,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.transformer, self.items, self.readout = transformer, items, readout
        self.batch_size, self.items_in_block = batch_size, items_in_block
        self.rank, self.processes = rank, processes
        held_out_n = is_held_out(torch.arange(len(items)))
        held_out_n[-1] |= not held_out_n.any()  # of very few items, the last
        self.held_out_items = [items[i] for i in held_out_n.nonzero()[:, 0].tolist()]
        self.training = (~held_out_n).nonzero()[:, 0].tolist()
        if len(self.training) < processes:
            raise UserError(f"{len(items)} items are too few to train on; give more")

    @cached_property
    def n_tokens(self) -> int:
        """Estimated from one batch of items from all over them."""
        picks = torch.linspace(0, len(self.training) - 1, self.batch_size).round().long().unique()
        sample = [self.items[self.training[i]] for i in picks.tolist()]
        in_sample = sum(len(roles_t) for _, roles_t, _ in self._tokens(sample))
        return round(in_sample * len(self.items) / len(sample))

    def epoch(self, generator: torch.Generator) -> list[list[int]]:
        """Item numbers in a random order, `items_in_block` at a time."""
        order = torch.randperm(len(self.training), generator=generator).tolist()
        mine = [self.training[i] for i in order[self.rank :: self.processes]]
        return in_blocks(mine, self.items_in_block)

    def read(self, block: list[int]) -> Block:
        """The tokens of some items, sinks aside."""
        parts = list(self._tokens([self.items[number] for number in block]))
        return Block(torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts]))

    def held_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Up to `tokens` tokens of the items that `read` never gives, sinks aside, and their roles;
        about twice as many are in memory at the most."""
        parts = self._tokens(self.held_out_items)
        return some_of(((activations_td, roles_t) for activations_td, roles_t, _ in parts), tokens)

    def _tokens(self, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Activations in bf16, roles, and whether pooled, of all tokens of some items but sinks."""
        for tokens in token_batches(self.transformer, items, self.readout, self.batch_size):
            kept_t = ~tokens.sink_t
            activations_td = tokens.activations_td[kept_t].to(torch.bfloat16).cpu()
            yield activations_td, tokens.roles_t[kept_t.cpu()], tokens.pooled_t[kept_t].cpu()
