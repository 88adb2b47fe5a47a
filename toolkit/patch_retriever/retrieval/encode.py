"""From items to embeddings in a file, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patch_retriever.errors import UserError, first_line
from patch_retriever.files import write
from patch_retriever.items import Item
from patch_retriever.progress import Progress, no_progress


def loader(model: Any) -> Callable[[Item], Any]:
    """How `model` takes items: as chats where it has a chat template, else as they are."""
    return Item.load if "message" in model.modalities else Item.load_plain


def encode_file(
    model: Any,
    items: Sequence[Item],
    out: Path,
    role: str,
    batch_size: int,
    progress: Progress = no_progress,
    name: str = "the model",
) -> tuple[int, int]:
    """Write the embeddings of `items` as a .npy file (n, d) in float32; returns its shape."""
    encode = model.encode_query if role == "query" else model.encode_document
    load = loader(model)
    shape = (len(items), model.get_embedding_dimension())

    def fill(path: Path) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array_header_2_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
            starts = range(0, len(items), batch_size)
            for start in progress(starts, len(starts)):
                batch = [load(item) for item in items[start : start + batch_size]]
                try:
                    rows = encode(batch, batch_size=batch_size, show_progress_bar=False)
                except (ValueError, TypeError) as error:
                    reason = first_line(error)
                    raise UserError(f"{name}: cannot encode these items ({reason})") from error
                file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())

    write(out, fill)
    return shape
