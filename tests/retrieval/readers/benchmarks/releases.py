"""Small files in the layouts of real releases."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MBEIR_ITEM = {"id": "string", "modality": "string", "text": "string"}
"""What `datasets` writes into the schema of a file beside the column of pictures."""


def png(number: int) -> bytes:
    """A picture unlike that of any other number below 256**3."""
    buffer = io.BytesIO()
    colour = (number % 256, number // 256 % 256, number // 65536)
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def colour(picture: Any) -> int:
    """The number of a picture that `png` made."""
    red, green, blue = picture.open().getpixel((0, 0))
    return red + 256 * green + 65536 * blue


def write_png(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")


def write_items(path: Path, rows: Sequence[dict[str, Any]], group: int = 3) -> None:
    """Queries or a corpus as MRBench has them: id, modality, text, image."""
    features: dict[str, Any] = {
        name: {"dtype": dtype, "_type": "Value"} for name, dtype in MBEIR_ITEM.items()
    }
    features["image"] = {"_type": "Image"}
    schema = pa.schema(
        [*((name, pa.string()) for name in MBEIR_ITEM), ("image", HF_IMAGE)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=group)


def write_qrels(path: Path, judged: Sequence[tuple[str, str, int]]) -> None:
    """query-id, Q0, corpus-id, score: int8."""
    names = ("query-id", "Q0", "corpus-id")
    schema = pa.schema([*((name, pa.string()) for name in names), ("score", pa.int8())])
    rows = [{"query-id": q, "Q0": "0", "corpus-id": d, "score": s} for q, d, s in judged]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def hf_image(number: int | None) -> dict[str, Any] | None:
    return None if number is None else {"bytes": png(number), "path": None}


def item(name: str, modality: str, text: str | None, picture: int | None) -> dict[str, Any]:
    return {"id": name, "modality": modality, "text": text, "image": hf_image(picture)}


def only_task(spec: str, **options: Any) -> RetrievalTask:
    """The one task that a spec names."""
    (task,) = read_tasks(spec, ReadOptions(**options))
    return task


def refusal(spec: str, **options: Any) -> str:
    """The one line by which a spec is refused."""
    with pytest.raises(UserError) as raised:
        read_tasks(spec, ReadOptions(**options))
    assert "\n" not in str(raised.value)
    return str(raised.value)
