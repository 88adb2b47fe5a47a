"""M-BEIR and COCO in a few rows, in the layouts of MRBench and lmms-lab."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TEST = "test-00000-of-00001.parquet"
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
N = 12


def picture(number: int) -> dict[str, Any]:
    """A picture unlike any other, as `datasets` writes it."""
    image = Image.new("RGB", (50 + number % 5, 40 + number % 7), COLOURS[number % len(COLOURS)])
    image.putpixel((number % 40, number // 40), (1, 2, 3))
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def words(number: int) -> str:
    return f"a {COLOURS[number % len(COLOURS)]} thing, number {number}"


def rows(kind: str, numbers: Sequence[int], dataset: int) -> list[dict[str, Any]]:
    """Items of a kind in M-BEIR's words."""
    return [
        {
            "id": f"{dataset}:{number}",
            "modality": kind,
            "text": words(number) if "text" in kind else None,
            "image": picture(number) if "image" in kind else None,
        }
        for number in numbers
    ]


def write_task(root: Path, name: str, kinds: tuple[str, str], dataset: int) -> None:
    """A task of N queries; the answer to query i is candidate 100 + i, of 3 N."""
    schema = pa.schema(
        [*((c, pa.string()) for c in ("id", "modality", "text")), ("image", HF_IMAGE)]
    )
    sides = {"query": rows(kinds[0], range(N), dataset)}
    sides["corpus"] = rows(kinds[1], range(100, 100 + 3 * N), dataset)
    for part, found in sides.items():
        path = root / name / part / (TEST if part == "query" else "corpus-00000-of-00001.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(found, schema), path)
    judged = [
        {"query-id": f"{dataset}:{i}", "Q0": "0", "corpus-id": f"{dataset}:{100 + i}", "score": 1}
        for i in range(N)
    ]
    path = root / name / "qrels" / TEST
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(judged), path)


def write_mbeir(root: Path) -> Path:
    """One task of every pair of kinds that the paper's tables need."""
    write_task(root, "mbeir_mscoco_task3", ("image", "text"), 9)
    write_task(root, "mbeir_nights_task4", ("image", "image"), 4)
    write_task(root, "mbeir_cirr_task7", ("image,text", "image"), 8)
    write_task(root, "mbeir_webqa_task2", ("text", "image,text"), 2)
    return root


def write_coco(root: Path, n: int = 30) -> Path:
    """COCO's captions in two files: two captions a picture, the first rows' among the test's."""
    found = [
        {
            "question_id": str(i),
            "image": picture(200 + i),
            "question": "Please carefully observe the image and come up with a caption for it.",
            "answer": [words(100 + i if i < 4 else 300 + i), f"{words(300 + i)} again"],
        }
        for i in range(n)
    ]
    schema = pa.schema(
        [
            ("question_id", pa.string()),
            ("image", HF_IMAGE),
            ("question", pa.string()),
            ("answer", pa.list_(pa.string())),
        ]
    )
    (root / "data").mkdir(parents=True)
    for k, part in enumerate((found[: n // 2], found[n // 2 :])):
        path = root / "data" / f"val-{k:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=4)
    return root


def write_uniir(root: Path, validation: Sequence[int]) -> Path:
    """CIRR in UniIR's release: N test queries, and the numbered ones as validation queries."""
    name, pictures = "mbeir_cirr_task7", root / "mbeir_images"

    def shown(number: int) -> str:
        path = pictures / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number)["bytes"])
        return str(path.relative_to(root))

    def write(path: str, lines: Sequence[str]) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("".join(f"{line}\n" for line in lines))

    for split, numbers in (("test", range(N)), ("val", validation)):
        asked = [
            {
                "qid": f"8:{i}",
                "query_txt": words(i),
                "query_img_path": shown(i),
                "query_modality": "image,text",
                "pos_cand_list": [f"8:{100 + i % N}"],
                "task_id": 7,
            }
            for i in numbers
        ]
        write(f"query/{split}/{name}_{split}.jsonl", list(map(json.dumps, asked)))
        judged = [f"{q['qid']} 0 {q['pos_cand_list'][0]} 1 7" for q in asked]
        write(f"qrels/{split}/{name}_{split}_qrels.txt", judged)
    pool = [
        {"did": f"8:{i}", "txt": None, "img_path": shown(i), "modality": "image"}
        for i in range(100, 100 + 3 * N)
    ]
    write(f"cand_pool/local/{name}_cand_pool.jsonl", list(map(json.dumps, pool)))
    return root
