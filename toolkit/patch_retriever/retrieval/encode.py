"""Items from a file to embeddings in a file, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patch_retriever.errors import UserError
from patch_retriever.files import write
from patch_retriever.items import Item
from patch_retriever.pictures import PictureFile
from patch_retriever.progress import Progress, no_progress

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Encoder, Role


def read_items(path: Path) -> list[Item]:
    """Items of a JSON-lines file of `{"text": ..., "image": ...}`; pictures are not opened yet.

    Raises:
        UserError: the file is missing or empty, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, image = row.get("text"), row.get("image")
        except (ValueError, AttributeError):
            raise UserError(f"{path}:{number}: not a JSON object") from None
        if (
            not isinstance(text, str | None)
            or not isinstance(image, str | None)
            or not (text or image)
        ):
            raise UserError(f'{path}:{number}: "text", "image" or both expected, as strings')
        items.append(Item(text or None, PictureFile(path.parent / image) if image else None))
    if not items:
        raise UserError(f'{path}: empty; one JSON object a line expected, with "text" or "image"')
    return items


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
