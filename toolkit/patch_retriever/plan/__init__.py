"""What a build will take: bytes on disk, memory and operations of every stage, before it runs.

`recipes/benchmarks/scale.py` holds a plan against a run.
"""

from patch_retriever.plan.sizes import Fits, Sizes, Split
from patch_retriever.plan.speed import ACCELERATOR, Speed, measured_speed
from patch_retriever.plan.stages import RUNTIME_BYTES, Stage, stages, store_tokens
from patch_retriever.plan.table import plan_json, plan_lines

__all__ = [
    "ACCELERATOR",
    "RUNTIME_BYTES",
    "Fits",
    "Sizes",
    "Speed",
    "Split",
    "Stage",
    "measured_speed",
    "plan_json",
    "plan_lines",
    "stages",
    "store_tokens",
]
