"""From blocks of activations to shuffled training batches, read ahead by a thread.

Everything random follows from the seed and the position, so a stream can go on from any position
and gives what it would have given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from patch_retriever.ahead import made_ahead

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Block:
    """As many tokens as are shuffled together: activations (t, d) in bf16, and whether the
    readout's pooling reads them, (t,)."""

    activations_td: Tensor
    pooled_t: Tensor


class Source(Protocol):
    """Where training tokens come from: a store, or the backbone itself."""

    @property
    def n_tokens(self) -> int | None:
        """About how many there are, over all processes; None where that is not known."""
        ...

    def epoch(self, generator: torch.Generator) -> list[list[int]]:
        """The blocks of one epoch, each named by numbers of shards or items, in random order."""
        ...

    def read(self, block: list[int]) -> Block:
        """A block's tokens (this process's share of them)."""
        ...

    def held_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens (t, d) in float32 that `read` never gives, and their roles (t,)."""
        ...


def is_held_out(numbers_n: Tensor) -> Tensor:
    """Whether items (or tokens) of these numbers are kept from training: about one in twenty,
    scattered, always the same ones. SAEs are measured on them."""
    mixed_n = numbers_n.long() + 1
    for _ in range(2):  # the mixing steps of a 32-bit hash: no period in the numbers survives
        mixed_n = ((mixed_n >> 16) ^ mixed_n) * 0x45D9F3B & 0xFFFFFFFF
    return ((mixed_n >> 16) ^ mixed_n) % 20 == 6


def in_blocks(numbers: list[int], size: int) -> list[list[int]]:
    """Up to `size` numbers a block, spread evenly, so that no block is a small rest."""
    count = -(-len(numbers) // size)
    return [part.tolist() for part in np.array_split(np.array(numbers, int), count)]


def some_of(parts: Iterable[tuple[Tensor, Tensor]], n: int) -> tuple[Tensor, Tensor]:
    """Up to n tokens, in float32, scattered over all of `parts`, with their roles, in their order;
    no more than 2 n and a part are held at once. At least one part is expected."""
    generator = _generator(0)
    held: list[tuple[Tensor, ...]] = []  # activations, roles, and a random rank of every token

    def thin_out() -> None:
        tokens_td, roles_t, rank_t = map(torch.cat, zip(*held, strict=True))
        picks = rank_t.argsort()[:n].sort().values
        held[:] = [(tokens_td[picks], roles_t[picks], rank_t[picks])]

    for tokens_td, roles_t in parts:
        held.append((tokens_td, roles_t, torch.rand(len(roles_t), generator=generator)))
        if sum(len(roles_t) for _, roles_t, _ in held) > 2 * n:
            thin_out()
    thin_out()
    tokens_td, roles_t, _ = held[0]
    return tokens_td.float(), roles_t


class Position(NamedTuple):
    """A place in the stream: the next batch to come."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    start: Position | None = None,
    pooled_share: float = 0.0,
) -> Generator[tuple[Tensor, Position]]:
    """Endless shuffled float32 batches (batch_size, d), each with the position after it.

    Blocks come in a new random order every epoch and tokens are shuffled within a block. With
    `pooled_share`, tokens that the pooling reads are repeated until they are that share of a batch
    (a last-token readout uses one in many). While a block is used, the next is being read: at most
    three are in memory.
    """
    start = start or Position()
    with closing(_blocks(source, seed, start)) as blocks:
        for epoch, number, block in blocks:
            if not len(block.pooled_t):
                continue  # this process's share of a very small block
            picks = _repeat_pooled(block.pooled_t, pooled_share)
            picks = picks.repeat(-(-batch_size // len(picks)))  # a batch at least
            generator = _generator(seed, epoch, number + 1)
            picks = picks[torch.randperm(len(picks), generator=generator)]
            here = (epoch, number) == (start.epoch, start.block)
            for batch in range(start.batch if here else 0, len(picks) // batch_size):
                rows = picks[batch * batch_size : (batch + 1) * batch_size]
                yield block.activations_td[rows].float(), Position(epoch, number, batch + 1)


def _blocks(source: Source, seed: int, start: Position) -> Generator[tuple[int, int, Block]]:
    """Endless blocks from a position on, with their epoch and number; one is read ahead."""

    def named() -> Iterator[tuple[int, int, list[int]]]:
        epoch, first = start.epoch, start.block
        while True:
            numbers = source.epoch(_generator(seed, epoch, 0))
            for number in range(first, len(numbers)):
                yield epoch, number, numbers[number]
            epoch, first = epoch + 1, 0

    def read(name: tuple[int, int, list[int]]) -> tuple[int, int, Block]:
        epoch, number, block = name
        return epoch, number, source.read(block)

    return made_ahead(read, named())


def _generator(*seeds: int) -> torch.Generator:
    """A generator that follows from several numbers."""
    (seed,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) >> 1)


def _repeat_pooled(pooled_t: Tensor, share: float) -> Tensor:
    """Token numbers, those in `pooled_t` repeated until they make up about `share` of all."""
    all_t = torch.arange(len(pooled_t))
    n_pooled = int(pooled_t.sum())
    if share <= 0 or n_pooled == 0 or n_pooled == len(pooled_t):
        return all_t
    others = len(pooled_t) - n_pooled
    repeats = max(1, round(share / (1 - share) * others / n_pooled))
    return torch.cat([all_t[~pooled_t], all_t[pooled_t].repeat(repeats)])
