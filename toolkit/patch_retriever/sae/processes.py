"""Several processes that train one SAE together, each on its share of every batch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Which process this is, among how many, and where it computes; alone by default."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @classmethod
    def launched(cls, device: str = "cpu") -> Processes:
        """As `accelerate launch` or `torchrun` started this process; alone without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=device)
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes, str(state.device))

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor.to(self.device), "mean").to(tensor.device)

    def gather(self, value: object) -> list[object]:
        """Every process's value, in the order of ranks."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])
