"""The activation store: token activations with their roles, in bf16 shards on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.activations.stream import Block, in_blocks, is_held_out, some_of
from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
FEW_ITEMS = 100
"""With fewer items than this, single tokens are held out instead of items."""


class StoreWriter:
    """Writes shards of about `tokens_per_shard` tokens; `close` writes the index last.

    A store without an index is unfinished and is not read.
    """

    def __init__(self, folder: Path, tokens_per_shard: int = 16_384) -> None:
        self.folder = folder
        self.tokens_per_shard = tokens_per_shard
        self._waiting: list[dict[str, Tensor]] = []
        self._shards: list[dict[str, object]] = []
        self._d = self._n_items = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)

    def add(
        self, activations_td: Tensor, roles_t: Tensor, pooled_t: Tensor, items_t: Tensor
    ) -> None:
        """Add tokens: activations, role numbers, whether the readout's pooling reads them, and the
        number of the item that they are part of."""
        self._waiting.append(
            {
                "activations_td": activations_td.to(torch.bfloat16).cpu(),
                "roles_t": roles_t.to(torch.uint8).cpu(),
                "pooled_t": pooled_t.to(torch.uint8).cpu(),
                "items_t": items_t.to(torch.int32).cpu(),
            }
        )
        self._d = activations_td.shape[1]
        if len(items_t):
            self._n_items = max(self._n_items, int(items_t.max()) + 1)
        if sum(len(w["roles_t"]) for w in self._waiting) >= self.tokens_per_shard:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        shard = {key: torch.cat([w[key] for w in self._waiting]) for key in self._waiting[0]}
        self._waiting.clear()
        name = f"shard-{len(self._shards):05d}.safetensors"
        write_tensors(self.folder / name, shard)
        self._shards.append(
            {
                "file": name,
                "tokens": len(shard["roles_t"]),
                "sha256": file_hash(self.folder / name),
            }
        )

    def close(self, pairs: list[list[int]] | None = None) -> None:
        """Write what is waiting and the index; `pairs` are the items that belong together."""
        self._flush()
        index = {"d": self._d, "items": self._n_items, "pairs": pairs or [], "shards": self._shards}
        write_json(self.folder / INDEX, index)


class Store:
    """A finished activation store, read a few shards at a time.

    A shard's hash is checked when it is read for the first time.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Raises:
            UserError: there is no finished store in the folder.
        """
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
            self.shards: list[dict[str, Any]] = index["shards"]
            self.pairs: list[list[int]] = index["pairs"]
            self.d, self.n_items = int(index["d"]), int(index["items"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder}: no finished activation store; `patch-retriever build` writes one to "
                "OUT/run/collect"
            ) from None
        if not self.shards:
            raise UserError(f"{folder}: the activation store is empty; collect some items into it")
        self._checked: set[int] = set()

    @property
    def n_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def read(self, number: int) -> dict[str, Tensor]:
        """One shard: `activations_td` (bf16), `roles_t`, `pooled_t`, `items_t`.

        Raises:
            UserError: the file is missing or not what was written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        shard = self.shards[number]
        path = self.folder / shard["file"]
        try:
            if number not in self._checked and file_hash(path) != shard["sha256"]:
                raise ValueError("its bytes changed")
            self._checked.add(number)
            return load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path}: damaged or missing ({error}); collect the activations again"
            ) from None

    def training(self, number: int) -> tuple[Tensor, Tensor]:
        """A shard's activations (t, d) and which are pooled (t,), without what is held out."""
        shard = self.read(number)
        kept_t = ~self._is_held_out(number, shard)
        return shard["activations_td"][kept_t], shard["pooled_t"][kept_t].bool()

    def held_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Up to `tokens` tokens of held-out items, from all over the store: float32 activations
        (t, d) and roles (t,)."""
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
        kept_t = self._is_held_out(number, shard)
        return shard["activations_td"][kept_t], shard["roles_t"][kept_t]

    def _is_held_out(self, number: int, shard: dict[str, Tensor]) -> Tensor:
        """Which tokens are; by items, or by themselves where there are few items."""
        if self.n_items >= FEW_ITEMS:
            return is_held_out(shard["items_t"])
        before = sum(s["tokens"] for s in self.shards[:number])
        return is_held_out(torch.arange(before, before + len(shard["items_t"])))

    def training_pairs(self) -> Tensor:
        """Pooled vectors of the pairs of which no item is held out, (p, 2, d).

        Raises:
            UserError: the store was collected without pairs.
        """
        pairs_p2 = torch.tensor(self.pairs, dtype=torch.long).view(-1, 2)
        if self.n_items >= FEW_ITEMS:
            pairs_p2 = pairs_p2[~is_held_out(pairs_p2).any(1)]
        if not len(pairs_p2):
            raise UserError(f"{self.folder}: no pairs in this store; shared concepts need them")
        return self.pooled_vectors()[pairs_p2]

    def pooled_vectors(self) -> Tensor:
        """Every item's mean over the tokens that the readout's pooling reads, (items, d)."""
        sums_id, counts_i = torch.zeros(self.n_items, self.d), torch.zeros(self.n_items)
        for number in range(len(self.shards)):
            shard = self.read(number)
            pooled_t = shard["pooled_t"].bool()
            items_t = shard["items_t"][pooled_t].long()
            sums_id.index_add_(0, items_t, shard["activations_td"][pooled_t].float())
            counts_i.index_add_(0, items_t, torch.ones(len(items_t)))
        return sums_id / counts_i.clamp(min=1)[:, None]


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
