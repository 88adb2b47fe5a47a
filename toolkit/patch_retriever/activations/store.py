"""The activation store: token activations with their roles, in bf16 shards on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patch_retriever.files import file_hash, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"


class StoreWriter:
    """Writes shards of about `tokens_per_shard` tokens; `close` writes the index last.

    A store without an index is unfinished and is not read.
    """

    def __init__(self, folder: Path, tokens_per_shard: int = 16_384) -> None:
        self.folder = folder
        self.tokens_per_shard = tokens_per_shard
        self._waiting: list[dict[str, Tensor]] = []
        self._shards: list[dict[str, object]] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)

    def add(self, activations_td: Tensor, roles_t: Tensor, pooled_t: Tensor) -> None:
        """Add tokens: activations, role numbers, and whether the readout's pooling reads them."""
        self._waiting.append(
            {
                "activations_td": activations_td.to(torch.bfloat16).cpu(),
                "roles_t": roles_t.to(torch.uint8).cpu(),
                "pooled_t": pooled_t.to(torch.uint8).cpu(),
            }
        )
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

    def close(self) -> None:
        """Write what is waiting and the index."""
        self._flush()
        write_json(self.folder / INDEX, {"shards": self._shards})


class Store:
    """A finished activation store, read a few shards at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = json.loads((folder / INDEX).read_text())["shards"]

    @property
    def n_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def read(self, number: int) -> dict[str, Tensor]:
        """One shard: `activations_td` (bf16), `roles_t`, `pooled_t`."""
        from safetensors.torch import load_file

        return load_file(self.folder / self.shards[number]["file"])

    def training_batches(
        self, batch_size: int, seed: int, pooled_share: float = 0.0, shards_in_memory: int = 16
    ) -> Iterator[Tensor]:
        """Endless shuffled float32 batches (batch_size, d).

        Shards are read in a new random order every epoch, `shards_in_memory` at a time, and
        tokens are shuffled among those. With `pooled_share`, tokens that the pooling reads are
        repeated until they are that share of a batch (a last-token readout uses one in many).
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.shards), generator=generator).tolist()
            for start in range(0, len(order), shards_in_memory):
                shards = [self.read(i) for i in order[start : start + shards_in_memory]]
                tokens_td = torch.cat([s["activations_td"] for s in shards])
                pooled_t = torch.cat([s["pooled_t"] for s in shards]).bool()
                picks = _repeat_pooled(pooled_t, pooled_share)
                picks = picks.repeat(-(-batch_size // len(picks)))  # a batch at least
                picks = picks[torch.randperm(len(picks), generator=generator)]
                for k in range(0, len(picks) - batch_size + 1, batch_size):
                    yield tokens_td[picks[k : k + batch_size]].float()


def _repeat_pooled(pooled_t: Tensor, share: float) -> Tensor:
    """Token numbers, those in `pooled_t` repeated until they make up about `share` of all."""
    all_t = torch.arange(len(pooled_t))
    n_pooled = int(pooled_t.sum())
    if share <= 0 or n_pooled == 0 or n_pooled == len(pooled_t):
        return all_t
    others = len(pooled_t) - n_pooled
    repeats = max(1, round(share / (1 - share) * others / n_pooled))
    return torch.cat([all_t[~pooled_t], all_t[pooled_t].repeat(repeats)])
