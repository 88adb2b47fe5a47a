"""The activation store: token activations with their roles, in bf16 shards on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.activations.sinks import SinkReport
from patch_retriever.activations.stream import Block, in_blocks, is_held_out, some_of
from patch_retriever.activations.writer import FORMAT, INDEX, pooled_sums
from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, inside

if TYPE_CHECKING:
    from torch import Tensor

FEW_ITEMS = 100
"""With fewer items than this, single tokens are held out instead of items."""


class Store:
    """A finished activation store, read a few shards at a time.

    A file's hash is checked when it is read for the first time. `site` is where its activations
    were read and `sinks` what was found of sinks there, of all tokens that were collected; both are
    None for stores of the first format, which did not look for sinks.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Raises:
            UserError: there is no finished store in the folder, or a newer version wrote it.
        """
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
            written = int(index.get("format", 1))
            self.shards: list[dict[str, Any]] = index["shards"]
            self.pairs: list[list[int]] = index["pairs"]
            self.d, self.n_items = int(index["d"]), int(index["items"])
            self.site: str | None = index.get("site")
            found = index.get("sinks")
            self.sinks = None if found is None else SinkReport.from_json(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{folder}: no finished activation store; `patch-retriever build` writes one to "
                "OUT/run/collect"
            ) from None
        if written > FORMAT:
            raise UserError(
                f"{folder}: an activation store of format {written}, and this version reads up to "
                f"{FORMAT}; update patch-retriever"
            )
        if not self.shards:
            raise UserError(f"{folder}: the activation store is empty; collect some items into it")
        self._checked: set[Path] = set()

    @property
    def n_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def read(self, number: int) -> dict[str, Tensor]:
        """One shard: `activations_td` (bf16), `roles_t`, `pooled_t`, `items_t`, `sink_t`.

        Raises:
            UserError: the file is missing or not what was written.
        """
        shard = self._load(self.shards[number])
        if "sink_t" not in shard:
            shard["sink_t"] = torch.zeros_like(shard["pooled_t"])
        return shard

    def _load(self, written: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of a file that the index names with its hash."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = inside(self.folder, str(written["file"]), self.folder / INDEX)
        try:
            if path not in self._checked and file_hash(path) != written["sha256"]:
                raise ValueError("its bytes changed")
            self._checked.add(path)
            return load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path}: damaged or missing ({error}); collect the activations again"
            ) from None

    def training(self, number: int) -> tuple[Tensor, Tensor]:
        """A shard's activations (t, d) and which are pooled (t,), without what is held out and
        without sinks."""
        shard = self.read(number)
        kept_t = ~self._is_held_out(number, shard) & ~shard["sink_t"].bool()
        return shard["activations_td"][kept_t], shard["pooled_t"][kept_t].bool()

    def held_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Up to `tokens` tokens of held-out items, from all over the store and without sinks:
        float32 activations (t, d) and roles (t,)."""
        n = len(self.shards)
        # about one in twenty is held out; shards are alike in kind only within a stretch
        wanted = min(n, max(16, round(20 * tokens * n / self.n_tokens)))
        numbers = torch.linspace(0, n - 1, wanted).round().long().tolist()
        activations_td, roles_t = some_of(map(self._held_out, numbers), tokens)
        if not len(roles_t):
            raise UserError(f"{self.folder}: too few tokens to hold some out; collect more items")
        return activations_td, roles_t

    def _held_out(self, number: int) -> tuple[Tensor, Tensor]:
        shard = self.read(number)
        kept_t = self._is_held_out(number, shard) & ~shard["sink_t"].bool()
        return shard["activations_td"][kept_t], shard["roles_t"][kept_t]

    def _is_held_out(self, number: int, shard: dict[str, Tensor]) -> Tensor:
        """Which tokens are; by items, or by themselves where there are few items."""
        if self.n_items >= FEW_ITEMS:
            return is_held_out(shard["items_t"])
        before = sum(s["tokens"] for s in self.shards[:number])
        return is_held_out(torch.arange(before, before + len(shard["items_t"])))

    def training_pairs(self) -> Tensor:
        """Pooled vectors of the pairs of which no item is held out or has nothing but sinks to
        pool, (p, 2, d).

        Raises:
            UserError: the store was collected without pairs.
        """
        pairs_p2 = torch.tensor(self.pairs, dtype=torch.long).view(-1, 2)
        if self.n_items >= FEW_ITEMS:
            pairs_p2 = pairs_p2[~is_held_out(pairs_p2).any(1)]
        pooled_id, counts_i = self._pooled()
        pairs_p2 = pairs_p2[(counts_i[pairs_p2] > 0).all(1)]
        if not len(pairs_p2):
            raise UserError(f"{self.folder}: no pairs in this store; shared concepts need them")
        return pooled_id[pairs_p2]

    def pooled_vectors(self) -> Tensor:
        """Every item's mean over the tokens that the readout's pooling reads, sinks aside,
        (items, d); of all of them, even where only some are stored. 0 where there are none."""
        return self._pooled()[0]

    def _pooled(self) -> tuple[Tensor, Tensor]:
        """Every item's mean, and how many tokens it is of, (i,)."""
        sums_id, counts_i = torch.zeros(self.n_items, self.d), torch.zeros(self.n_items)
        for number, shard in enumerate(self.shards):
            sums = self._load(shard["sums"]) if "sums" in shard else pooled_sums(self.read(number))
            items_i = sums["items_i"].long()
            sums_id.index_add_(0, items_i, sums["sums_id"])
            counts_i.index_add_(0, items_i, sums["counts_i"].float())
        return sums_id / counts_i.clamp(min=1)[:, None], counts_i


def sinks_text(store: Store) -> str:
    """What was found of sinks where a store's activations were read: how many, where, how large."""
    if store.sinks is None:
        return "not looked for; an earlier version collected these activations"
    warning = f" ({store.sinks.warning})" if store.sinks.warning else ""
    return f"{store.sinks.to_text()}, at {store.site or 'an unnamed site'}{warning}"


class StoreSource:
    """A store as a source of training tokens; every process takes its share of every shard."""

    def __init__(
        self, store: Store, rank: int = 0, processes: int = 1, block_bytes: int = 536_870_912
    ) -> None:
        self.store, self.rank, self.processes = store, rank, processes
        largest = max(shard["tokens"] for shard in store.shards)
        self.shards_in_block = max(1, block_bytes * processes // (2 * store.d * largest))

    @property
    def n_tokens(self) -> int:
        """Tokens in the store."""
        return self.store.n_tokens

    def epoch(self, generator: torch.Generator) -> list[list[int]]:
        """Shard numbers in a random order, as many in a block as memory is meant for."""
        order = torch.randperm(len(self.store.shards), generator=generator).tolist()
        return in_blocks(order, self.shards_in_block)

    def read(self, block: list[int]) -> Block:
        """The tokens of some shards."""
        share = slice(self.rank, None, self.processes)
        parts = [self.store.training(number) for number in block]
        return Block(
            torch.cat([activations_td[share] for activations_td, _ in parts]),
            torch.cat([pooled_t[share] for _, pooled_t in parts]),
        )

    def held_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens that no training sees, and their roles."""
        return self.store.held_out(tokens)
