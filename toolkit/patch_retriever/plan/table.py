"""A plan as JSON and as a table for a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from patch_retriever.plan.sizes import Sizes
from patch_retriever.plan.speed import Speed
from patch_retriever.plan.stages import RUNTIME_BYTES, stages


def plan_json(sizes: Sizes, speed: Speed) -> dict[str, Any]:
    """A plan as JSON values; memory includes the runtime, not the model."""
    found = stages(sizes)
    model = sizes.parameters * sizes.parameter_bytes
    return {
        "sizes": asdict(sizes),
        "speed": asdict(speed),
        "stages": [
            {
                "stage": stage.name,
                "disk_bytes": stage.disk,
                "memory_bytes": stage.memory + RUNTIME_BYTES,
                "operations": stage.operations,
                "minutes": round(speed.minutes(stage), 1),
            }
            for stage in found
        ],
        "disk_bytes": sum(stage.disk for stage in found),
        "disk_bytes_without_the_model": sum(stage.disk for stage in found) - model,
        "memory_bytes": max(stage.memory for stage in found) + RUNTIME_BYTES + model,
        "memory_bytes_without_the_model": max(stage.memory for stage in found) + RUNTIME_BYTES,
        "minutes": round(sum(map(speed.minutes, found)), 1),
    }


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """A plan for a terminal."""
    row = "  {:<10} {:>9} {:>10} {:>12} {:>9}".format
    lines = [row("stage", "disk GB", "memory GB", "operations", "minutes")]
    for stage in plan["stages"]:
        lines.append(
            row(
                stage["stage"],
                f"{stage['disk_bytes'] / 1e9:.2f}",
                f"{stage['memory_bytes'] / 1e9:.2f}",
                f"{stage['operations']:.1e}",
                f"{stage['minutes']:.1f}",
            )
        )
    size = plan["sizes"]
    disk, memory = plan["disk_bytes"] / 1e9, plan["memory_bytes"] / 1e9
    own = plan["disk_bytes_without_the_model"] / 1e9, plan["memory_bytes_without_the_model"] / 1e9
    return [
        *lines,
        f"  in all {disk:.1f} GB on disk, {memory:.1f} GB of memory, {plan['minutes']:.0f} minutes "
        "at the speed of plain products",
        f"  without the model itself {own[0]:.1f} GB on disk, {own[1]:.1f} GB of memory",
        f"  d {size['width']}, {size['concepts']} concepts, {size['image_tokens']} tokens an "
        f"image, speed from {plan['speed']['source']}",
    ]
