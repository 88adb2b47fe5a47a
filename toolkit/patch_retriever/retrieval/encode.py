"""From items to embeddings in a file, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from patch_retriever.ahead import WORKERS
from patch_retriever.files import write
from patch_retriever.items import Item
from patch_retriever.progress import Progress, Ticks, no_progress
from patch_retriever.retrieval.reading import read_items

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Encoder, Role


def readable(
    items: Sequence[Item], progress: Progress = no_progress, workers: int = WORKERS
) -> tuple[list[int], list[str]]:
    """Numbers of the items whose pictures can be opened, and a line for each of the others."""

    kept: list[int] = []
    skipped: list[str] = []
    checked = read_items(items, Item.check_picture, workers)
    for number, problem in enumerate(progress(checked, len(items))):
        if problem is None:
            kept.append(number)
        else:
            skipped.append(str(problem))
    return kept, skipped


def encode_file(
    encoder: Encoder,
    items: Sequence[Item],
    out: Path,
    role: Role,
    batch_size: int,
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """Write the vectors of `items` as a .npy file (n, d) in float32; returns its shape.

    Raises:
        UserError: a picture cannot be read, the model does not take such items, or the file
            cannot be written.
    """
    shape = (len(items), encoder.dimension)

    def fill(path: Path) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array_header_2_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
            write_vectors(file, encoder, items, role, None, batch_size, progress)

    write(out, fill)
    return shape


def write_vectors(
    file: BinaryIO,
    encoder: Encoder,
    items: Sequence[Item],
    role: Role,
    prompt: str | None,
    batch_size: int,
    progress: Progress = no_progress,
) -> None:
    """Append the vectors (n, d) of `items` in float32, each in its place; a batch is in memory."""
    begin, ticks = file.tell(), Ticks(progress, len(items))
    for positions, pooled_nw in encoder.stream(items, role, prompt, batch_size):
        rows_nd = encoder.finish(pooled_nw, role).astype("<f4", copy=False)
        for position, row_d in zip(positions, rows_nd, strict=True):
            file.seek(begin + position * row_d.nbytes)
            file.write(row_d.tobytes())
        ticks.tick(len(positions))
    ticks.end()
