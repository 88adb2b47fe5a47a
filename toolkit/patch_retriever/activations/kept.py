"""Tokens of items that went through the model once, on disk for the passes after it.

The choice of a readout runs all of the decoder over most of the items that the SAE, the concepts'
scores and the patches are made from. What it has computed is kept, up to a limit; of the sites that
it looks at, only the chosen one's in the end. Items that are not kept go through the model again.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence

from patch_retriever.activations.batches import TokenBatch
from patch_retriever.backbones.readout import Readout
from patch_retriever.files import inside, write_json, write_tensors
from patch_retriever.items import Item

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BYTES = 2 * 2**30
"""Bytes on disk while readouts are tried, over all of their sites."""
_SHARD = 2**26
"""Bytes of a shard, over all sites."""
_INDEX = "index.json"


def tokens_of(readout: Readout) -> Readout:
    """The readouts whose tokens are the same: their pooling aside."""
    return replace(readout, pooling="mean")


class KeptWriter:
    """Keeps tokens of items under readouts of one prompt.

    Args:
        folder: where they go.
        items: all that will ever be asked for, in an order that does not change.
        limit: of bytes on disk.
    """

    def __init__(self, folder: Path, items: Sequence[Item], limit: int = KEPT_BYTES) -> None:
        self._folder, self._numbers = folder, _numbers(items)
        self._left = limit
        self._shards: list[dict[str, list[int]]] = []
        self._files: dict[Readout, list[Path]] = {}
        self._waiting: list[tuple[int, Tensor, dict[Readout, Tensor]]] = []
        self._bytes = 0

    def add(
        self,
        items: Sequence[Item],
        tokens: Mapping[Readout, Tensor],
        mask_nt: Tensor,
        roles_nt: Tensor,
    ) -> None:
        """The tokens (n, t, d) of a batch of items by `tokens_of` the readouts, all of one prompt;
        once the limit is reached, nothing more is kept."""
        lengths_n = mask_nt.sum(1)
        row_bytes = sum(t.shape[2] * t.element_size() for t in tokens.values()) + 1
        wanted = int(lengths_n.sum()) * row_bytes
        if wanted > self._left:
            self._left = 0
            return
        self._left -= wanted
        self._bytes += wanted
        for i, item in enumerate(items):
            mask_t = mask_nt[i].bool()
            own = {readout: rows_ntd[i][mask_t].cpu() for readout, rows_ntd in tokens.items()}
            self._waiting.append((self._numbers[id(item)], roles_nt[i][mask_t.cpu()], own))
        if self._bytes >= _SHARD:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        numbers, roles, tokens = zip(*self._waiting, strict=True)
        self._shards.append({"items": list(numbers), "lengths": list(map(len, roles))})
        roles_t = torch.cat(roles)
        for i, readout in enumerate(tokens[0]):
            path = self._folder / f"{i}-{len(self._shards):05d}.safetensors"
            tokens_td = torch.cat([one[readout] for one in tokens])
            write_tensors(path, {"tokens_td": tokens_td, "roles_t": roles_t})
            self._files.setdefault(readout, []).append(path)
        self._waiting, self._bytes = [], 0

    def close(self, readout: Readout) -> None:
        """Keep what is of `readout` alone."""
        self._flush()
        files = self._files.pop(tokens_of(readout), [])
        for path in (path for paths in self._files.values() for path in paths):
            path.unlink()
        shards = [
            {**shard, "file": path.name} for shard, path in zip(self._shards, files, strict=True)
        ]
        write_json(
            self._folder / _INDEX, {"readout": tokens_of(readout).to_json(), "shards": shards}
        )


class KeptTokens:
    """What a `KeptWriter` left in a folder; `items` are the same as there."""

    def __init__(self, folder: Path, items: Sequence[Item]) -> None:
        self._folder, self._items, self._numbers = folder, items, _numbers(items)
        index = json.loads((folder / _INDEX).read_text())
        self._readout = Readout.from_json(index["readout"])
        self._shards: list[dict[str, Any]] = index["shards"]
        self._place = {
            number: (shard, row)
            for shard, one in enumerate(self._shards)
            for row, number in enumerate(one["items"])
        }

    def is_of(self, readout: Readout) -> bool:
        """Whether these are the tokens that a readout pools."""
        return tokens_of(readout) == self._readout

    def known(self, items: Sequence[Item]) -> tuple[list[int], list[int]]:
        """Positions of the items that are kept, as they lie here, and of all others."""
        places = [self._place_of(item) for item in items]
        known = [(place, i) for i, place in enumerate(places) if place is not None]
        return [i for _, i in sorted(known)], [i for i, place in enumerate(places) if place is None]

    def batches(
        self, items: Sequence[Item], known: Sequence[int], batch_size: int, device: torch.device
    ) -> Generator[TokenBatch]:
        """The tokens of the `known` items, on a device."""
        placed = [(*self._place[self._numbers[id(items[i])]], i) for i in known]
        for shard, group in groupby(placed, key=lambda place: place[0]):
            lengths = self._shards[shard]["lengths"]
            name = str(self._shards[shard]["file"])
            with safe_open(inside(self._folder, name, self._folder / _INDEX), "pt") as file:
                tokens = file.get_tensor("tokens_td").split(lengths)
                roles = file.get_tensor("roles_t").split(lengths)
            rows = [(row, i) for _, row, i in group]
            for start in range(0, len(rows), batch_size):
                some = rows[start : start + batch_size]
                lengths_n = torch.tensor([lengths[row] for row, _ in some])
                mask_nt = torch.arange(int(lengths_n.max())) < lengths_n[:, None]
                yield TokenBatch(
                    [i for _, i in some],
                    pad_sequence([tokens[row] for row, _ in some], batch_first=True).to(device),
                    mask_nt.long().to(device),
                    pad_sequence([roles[row] for row, _ in some], batch_first=True),
                )

    def _place_of(self, item: Item) -> tuple[int, int] | None:
        number = self._numbers.get(id(item))
        if number is None or self._items[number] is not item:
            return None
        return self._place.get(number)


def _numbers(items: Sequence[Item]) -> dict[int, int]:
    """Items are told apart by being the same object: hashing one would read its pictures."""
    return {id(item): number for number, item in enumerate(items)}
