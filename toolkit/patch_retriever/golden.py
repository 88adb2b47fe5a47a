"""Golden inputs: the proof, in a fresh process, that an exported folder equals the live model.

`golden/` inside an export holds a few pictures and texts, the live model's embeddings of them,
and a script that anyone can run where only sentence-transformers is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError
from patch_retriever.files import write_json, write_tensors, write_text
from patch_retriever.items import Item

if TYPE_CHECKING:
    from patch_retriever.retriever import PatchedRetriever

TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
"""Largest absolute difference of unit embeddings that counts as agreement, by the model's dtype."""
FOLDER = "golden"

CHECK = '''\
"""Check this model on this machine: python check.py (needs sentence-transformers alone)."""
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

here = Path(__file__).parent
inputs = json.loads((here / "inputs.json").read_text(encoding="utf-8"))
expected = load_file(here / "embeddings.safetensors")
model = SentenceTransformer(str(here.parent), device="cpu"FLAG)


def load(item):
    pictures = [Image.open(here / name) for name in item.get("images", ())]
    if not pictures:
        return item["text"]
    parts = {"text": item["text"]} if "text" in item else {}
    return {**parts, "image": pictures} if parts or len(pictures) > 1 else pictures[0]


items = [load(item) for item in inputs]
found = {
    "document": model.encode_document(items, convert_to_tensor=True),  # a mixed batch
    "query": model.encode_query(items, convert_to_tensor=True),
    "one_by_one": torch.stack([model.encode(item, convert_to_tensor=True) for item in items]),
}
if "unpatched" in expected:
    found["unpatched"] = model.encode_document(items, convert_to_tensor=True, patch=False)
largest = max(float((found[k].float() - expected[k]).abs().max()) for k in found)
dtype = str(model.dtype).removeprefix("torch.")
print(json.dumps({"max_abs_diff": largest, "dtype": dtype, "items": len(items)}))
sys.exit(0 if largest <= TOLERANCES[dtype] else 1)
'''.replace("TOLERANCES", repr(TOLERANCES))


def write_golden(
    folder: Path, retriever: PatchedRetriever, items: Sequence[Item], with_code: bool = False
) -> float:
    """Write `golden/` into an export: inputs, the live model's embeddings of all in one batch and
    of one at a time, the script.

    An export `with_code` of its own is loaded with `trust_remote_code=True`, and is also checked
    without its patch, which only such a one can be.

    Returns:
        The largest absolute difference that the batch makes to the live embeddings: rounding, and
        more of it the more the patch stretches the space.
    """
    import torch

    golden = folder / FOLDER
    golden.mkdir(parents=True, exist_ok=True)
    inputs = []
    for i, item in enumerate(items):
        entry: dict[str, Any] = {} if item.text is None else {"text": item.text}
        if item.pictures:
            entry["images"] = [f"{i}-{j}.png" for j in range(len(item.pictures))]
            for name, picture in zip(entry["images"], item.pictures, strict=True):
                picture.open().save(golden / name)
        inputs.append(entry)
    write_json(golden / "inputs.json", inputs)
    loaded = [item.load() for item in items]
    embeddings = {
        "query": retriever.encode_query(loaded, convert_to_tensor=True),
        "document": retriever.encode_document(loaded, convert_to_tensor=True),
        "one_by_one": torch.cat(
            [retriever.encode([chat], convert_to_tensor=True) for chat in loaded]
        ),
    }
    if with_code:
        embeddings["unpatched"] = retriever.encode_document(
            loaded, convert_to_tensor=True, patch=False
        )
    write_tensors(golden / "embeddings.safetensors", embeddings)
    flag = ", trust_remote_code=True" if with_code else ""
    write_text(golden / "check.py", CHECK.replace("FLAG", flag))
    return float((embeddings["one_by_one"] - embeddings["document"]).abs().max())


def check_golden(folder: Path) -> float:
    """Run the export's script in a fresh process; returns the largest absolute difference.

    Raises:
        UserError: the export does not load, or differs from the live model by more than its dtype
            allows (1e-5 in float32).
    """
    said, complaints = run_check(folder / FOLDER / "check.py")
    try:
        found = json.loads(said.strip().splitlines()[-1])
        largest, tolerance = float(found["max_abs_diff"]), TOLERANCES[found["dtype"]]
    except (IndexError, ValueError, KeyError):
        reason = (complaints.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{folder}: the exported model does not load ({reason})") from None
    if not largest <= tolerance:
        raise UserError(
            f"{folder}: the exported model differs from the live one by {largest:.2g} "
            f"(more than {tolerance:g}) on its golden inputs"
        )
    return largest


def run_check(script: Path) -> tuple[str, str]:
    """What the script prints in a fresh process: stdout and stderr."""
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True)
    return done.stdout, done.stderr
