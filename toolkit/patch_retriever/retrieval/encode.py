"""From items to embeddings in a file, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patch_retriever.errors import UserError
from patch_retriever.files import write
from patch_retriever.items import Item
from patch_retriever.progress import Progress, no_progress

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Encoder, Role


def readable(
    items: Sequence[Item], progress: Progress = no_progress
) -> tuple[list[int], list[str]]:
    """Numbers of the items whose pictures can be opened, and a line for each of the others."""
    kept: list[int] = []
    skipped: list[str] = []
    for i in progress(range(len(items)), len(items)):
        try:
            items[i].check_picture()
            kept.append(i)
        except UserError as error:
            skipped.append(str(error))
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
            starts = range(0, len(items), batch_size)
            for start in progress(starts, len(starts)):
                rows_nd = encoder.embed(
                    items[start : start + batch_size], role, batch_size=batch_size
                )
                file.write(np.ascontiguousarray(rows_nd, dtype="<f4").tobytes())

    write(out, fill)
    return shape
