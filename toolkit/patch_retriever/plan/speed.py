"""How fast a machine is: measured in a moment, or assumed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patch_retriever.plan.stages import Stage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Speed:
    """Operations a second: measured, or assumed."""

    host: float
    float32: float
    float64: float
    model: float
    source: str

    def minutes(self, stage: Stage) -> float:
        """What a stage takes at this speed."""
        seconds = stage.host / self.host + stage.model / self.model
        return (seconds + stage.float32 / self.float32 + stage.float64 / self.float64) / 60


ACCELERATOR = Speed(
    1e12, 3e13, 3e13, 3e14, "an assumed data-centre accelerator beside 16 cores, not measured"
)
"""A third of what an H100's data sheet says, and one TFLOP/s of a CPU."""


def measured_speed(device: str = "cpu", model_dtype: torch.dtype | None = None) -> Speed:
    """Products of matrices, timed for a moment on the CPU and on the device of a build.

    A product of matrices is the fastest there is. Others reach less, so a plan's minutes are a
    lower bound that is seldom missed by more than a factor of three.
    """
    import torch

    def rate(dtype: torch.dtype, device: str) -> float:
        a_nn = torch.ones(1024, 1024, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            float((a_nn @ a_nn)[0, 0])
            best = min(best, time.perf_counter() - began)
        return 2 * 1024**3 / best

    float32 = rate(torch.float32, device)
    return Speed(
        rate(torch.float32, "cpu"),
        float32,
        rate(torch.float64, device),
        rate(model_dtype or torch.float32, device),
        f"products of 1024 x 1024 matrices, timed on {device}",
    )
