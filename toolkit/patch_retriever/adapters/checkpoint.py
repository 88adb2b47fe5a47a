"""An adapter's training on disk, so that a stopped one goes on and ends as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from patch_retriever.adapters.looks import Look
from patch_retriever.errors import UserError, first_line
from patch_retriever.files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of every weight."""


class AdapterCheckpoint:
    """Weights, Adam's moments, the best weights so far and all looks, in one file that is written
    whole or not at all. One of another training (another `key`) is as none."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def save(
        self,
        parameters: Mapping[str, Parameter],
        optimiser: Optimizer,
        looks: list[Look],
        best: int,
        best_weights: dict[str, Tensor],
    ) -> None:
        """Write the state after the last look."""
        tensors = {f"best/{name}": values for name, values in best_weights.items()}
        for name, parameter in parameters.items():
            tensors[f"now/{name}"] = parameter.detach()
            state = optimiser.state.get(parameter, {})
            for moment in MOMENTS:  # none of a weight that no loss reaches
                if moment in state:
                    tensors[f"{moment}/{name}"] = state[moment]
        about = {"key": self.key, "best": best, "looks": [asdict(look) for look in looks]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {"training": json.dumps(about)})

    def load(
        self, parameters: Mapping[str, Parameter], optimiser: Optimizer
    ) -> tuple[list[Look], int, dict[str, Tensor]] | None:
        """The looks, the best one's number and its weights, with the rest set in `parameters` and
        `optimiser`; None where this training has no checkpoint.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["training"])
                if about["key"] != self.key:
                    return None
                looks = [Look(**values) for values in about["looks"]]
                best_weights = {n: file.get_tensor(f"best/{n}") for n in parameters}
                known = set(file.keys())
                moments = {
                    name: {m: file.get_tensor(f"{m}/{name}") for m in MOMENTS}
                    for name in parameters
                    if f"{MOMENTS[0]}/{name}" in known
                }
                now = {name: file.get_tensor(f"now/{name}") for name in parameters}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{self.path}: no readable checkpoint ({first_line(error)}); delete it to begin "
                "anew"
            ) from None
        step = looks[-1].step
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(now[name])
                if name in moments:
                    found = {m: values.to(parameter.device) for m, values in moments[name].items()}
                    optimiser.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        **found,
                    }
        return looks, about["best"], best_weights

    def remove(self) -> None:
        """Delete it: the training has ended."""
        self.path.unlink(missing_ok=True)
