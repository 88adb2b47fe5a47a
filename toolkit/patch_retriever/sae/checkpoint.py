"""A training's state on disk, so that a killed one goes on and ends as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path

from patch_retriever.activations.stream import Position
from patch_retriever.errors import UserError, first_line
from patch_retriever.files import write_tensors
from patch_retriever.sae.learner import Learner
from patch_retriever.sae.processes import Processes

FILE = "training.safetensors"
CHECKPOINT_FORMAT = 2
"""Raised when the state changes meaning, so that an old checkpoint is refused."""


class Checkpoint:
    """Weights, Adam's moments, dead counts and the place in the stream, of SAEs that train
    together: one file, written whole or not at all."""

    def __init__(
        self, folder: Path | None, key: str, learners: list[Learner], processes: Processes
    ) -> None:
        self.path = None if folder is None else folder / FILE
        self.key, self.learners, self.processes = key, learners, processes

    def save(self, step: int, position: Position, fvu: list[float]) -> None:
        """Write the state after `step` steps; `position` is this process's in the stream."""
        positions = self.processes.gather(list(position))
        if self.path is None or self.processes.rank != 0:
            return
        tensors = {
            f"{i}.{name}": tensor
            for i, learner in enumerate(self.learners)
            for name, tensor in learner.state().items()
        }
        about = {"key": self.key, "step": step, "positions": positions, "fvu": fvu}
        write_tensors(self.path, tensors, {"training": json.dumps(about)})

    def load(self) -> tuple[int, Position, list[float]]:
        """Steps done, the place in the stream and the FVU so far; a beginning without a file.

        Raises:
            UserError: the file is of a training with other settings or other tokens, or damaged.
        """
        if self.path is None or not self.path.is_file():
            return 0, Position(), [1.0] * len(self.learners)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["training"])
                same = about["key"] == self.key
                same = same and len(about["positions"]) == self.processes.count
                states = [
                    {name: file.get_tensor(f"{i}.{name}") for name in learner.state()}
                    for i, learner in enumerate(self.learners if same else [])
                ]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{self.path}: no readable checkpoint ({first_line(error)}); "
                "delete it to begin anew"
            ) from None
        if not same:
            raise UserError(
                f"{self.path}: from a training with other settings, tokens or processes; delete it "
                "to begin anew, or train into another folder"
            )
        for learner, state in zip(self.learners, states, strict=True):
            learner.restore(state)
        position = Position(*about["positions"][self.processes.rank])
        return about["step"], position, about["fvu"]
