"""Writing an activation store, shard by shard, so that a stopped writer can be gone on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.activations.sinks import SinkReport
from patch_retriever.files import clear_partial, file_hash, write_json, write_tensors
from patch_retriever.runs import PARTIAL, damaged

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
FORMAT = 2
"""Of the index. 1, which it does not say, had no sinks and no site."""


@dataclass(frozen=True)
class Mark:
    """A place between two batches from which the work that feeds a writer can go on."""

    items: int = 0
    """Items before it, in the order in which they come."""
    batches: int = 0
    """Batches after it that are in finished shards already."""
    state: dict[str, Any] = field(default_factory=dict)
    """What whoever feeds the writer had counted there, as JSON values."""


class StoreWriter:
    """Writes shards of about `tokens_per_shard` tokens; `close` writes the index last.

    A store without an index is unfinished and is not read. With an `identity` (JSON values that say
    what the store is of: the `key` of its stage, the batch size ...) a record of the finished
    shards stays beside them until the end, and a writer of the same identity goes on after them:
    its `mark` says where. It ends with the same bytes as one that was never stopped.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_shard: int = 16_384,
        site: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.site = folder, site
        self.tokens_per_shard = tokens_per_shard
        self._identity = identity
        self._waiting: list[dict[str, Tensor]] = []
        self._sums: list[dict[str, Tensor]] = []
        self._dropped = False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        self._done: dict[str, Any] = {"shards": [], "d": 0, "items": 0}
        self.mark, self._since_mark = Mark(), 0
        if identity is not None:
            self._go_on()

    def _go_on(self) -> None:
        """Take over what an earlier writer of the same identity finished; else clear it away."""
        clear_partial(self.folder)  # of a writer that was killed while it wrote
        try:
            partial = json.loads((self.folder / PARTIAL).read_text())
            done, mark = partial["done"], Mark(**partial["mark"])
            files = {name: sha256 for s in done["shards"] for name, sha256 in _files(s).items()}
            if any(Path(name).name != name for name in files):
                raise ValueError("no file of ours")
        except (OSError, ValueError, KeyError, TypeError):
            return
        same = all(partial.get(name) == value for name, value in (self._identity or {}).items())
        if same and damaged(self.folder, files) is None:
            self._done, self.mark = done, mark
            return
        for name in (*files, PARTIAL):
            (self.folder / name).unlink(missing_ok=True)

    def add(
        self,
        activations_td: Tensor,
        roles_t: Tensor,
        pooled_t: Tensor,
        items_t: Tensor,
        sink_t: Tensor | None = None,
        kept_t: Tensor | None = None,
    ) -> None:
        """Add a batch of tokens: activations, role numbers, whether the readout's pooling reads
        them, the number of the item that they are part of, and whether they are sinks.

        Where not all are kept (`kept_t`), the items' sums over pooled tokens are kept beside them.
        """
        self._since_mark += 1
        if self._since_mark <= self.mark.batches:
            return  # in a shard that was finished before
        sink_t = torch.zeros(len(roles_t)) if sink_t is None else sink_t
        tokens = {
            "activations_td": activations_td.to(torch.bfloat16).cpu(),
            "roles_t": roles_t.to(torch.uint8).cpu(),
            "pooled_t": pooled_t.to(torch.uint8).cpu(),
            "items_t": items_t.to(torch.int32).cpu(),
            "sink_t": sink_t.to(torch.uint8).cpu(),
        }
        if len(items_t):
            self._done["items"] = max(self._done["items"], int(items_t.max()) + 1)
        self._done["d"] = activations_td.shape[1]
        if kept_t is not None:
            self._sums.append(pooled_sums(tokens))
            self._dropped |= bool((tokens["pooled_t"].bool() & ~kept_t).any())
            tokens = {name: values[kept_t] for name, values in tokens.items()}
        self._waiting.append(tokens)
        if sum(len(w["roles_t"]) for w in self._waiting) >= self.tokens_per_shard:
            self._flush()

    def set_mark(self, items: int, state: dict[str, Any]) -> None:
        """From here on a stopped writer can be gone on from; `items` have been added."""
        self.mark, self._since_mark = Mark(items, 0, state), 0

    def _flush(self) -> None:
        if not self._waiting:
            return
        number = len(self._done["shards"])
        tokens = _joined(self._waiting)
        shard: dict[str, Any] = {"tokens": len(tokens["roles_t"])}
        shard |= self._write(f"shard-{number:05d}.safetensors", tokens)
        if self._dropped:
            shard["sums"] = self._write(f"sums-{number:05d}.safetensors", _joined(self._sums))
        self._waiting, self._sums, self._dropped = [], [], False
        self._done["shards"].append(shard)
        if self._identity is not None:
            mark = Mark(self.mark.items, self._since_mark, self.mark.state)
            record = {**self._identity, "done": self._done, "mark": asdict(mark)}
            write_json(self.folder / PARTIAL, record)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        write_tensors(self.folder / name, tensors)
        return {"file": name, "sha256": file_hash(self.folder / name)}

    def close(self, pairs: list[list[int]] | None = None, sinks: SinkReport | None = None) -> None:
        """Write what is waiting and the index; `pairs` are the items that belong together."""
        self._flush()
        found = {"sinks": None if sinks is None else sinks.to_json(), "site": self.site}
        index = {"format": FORMAT, **self._done, **found, "pairs": pairs or []}
        write_json(self.folder / INDEX, index)
        (self.folder / PARTIAL).unlink(missing_ok=True)


def pooled_sums(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the items of some tokens: their numbers (i,), and the sum (i, d) and number (i,) of the
    tokens that the readout's pooling reads and that are no sinks."""
    read_t = shard["pooled_t"].bool() & ~shard["sink_t"].bool()
    items_i, position_t = shard["items_t"].unique(return_inverse=True)
    sums_id = torch.zeros(len(items_i), shard["activations_td"].shape[1])
    sums_id.index_add_(0, position_t[read_t], shard["activations_td"][read_t].float())
    counts_i = torch.bincount(position_t[read_t], minlength=len(items_i))
    return {"items_i": items_i, "sums_id": sums_id, "counts_i": counts_i.int()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _files(shard: Mapping[str, Any]) -> dict[str, str]:
    """The files of a shard with their hashes."""
    return {one["file"]: one["sha256"] for one in (shard, shard.get("sums")) if one}
