"""Processes that know no more than a user's: sentence-transformers, and not this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from families import vision_operators
from patch_retriever.items import Item

CHILD = """\
import json
import sys
import traceback
from importlib.util import find_spec

import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

torch.set_num_threads(1)
assert find_spec("patch_retriever") is None
said, sys.stdout = sys.stdout, sys.stderr


def load(item):
    if "image" not in item:
        return item["text"]
    picture = Image.open(item["image"])
    return {"text": item["text"], "image": picture} if "text" in item else picture


for line in sys.stdin:
    asked = json.loads(line)
    answer = {}
    try:
        model = SentenceTransformer(asked["folder"], device="cpu", **asked["options"])
        found = {}
        for name, items in asked["batches"].items():
            items = [load(item) for item in items]
            for role in ("query", "document"):
                encode = getattr(model, f"encode_{role}")
                found[f"{name} {role}"] = encode(items, convert_to_tensor=True).float().clone()
        save_file(found, asked["out"])
        processor = getattr(model[0].processor, "image_processor", None)
        answer["image_processor"] = type(processor).__name__
    except Exception:
        answer["error"] = traceback.format_exc()
    print(json.dumps(answer), file=said, flush=True)
"""


def make_python(folder: Path) -> Path:
    """An interpreter that sees the packages installed here, not this one, even where it is
    installed for editing; and torchvision, where VARIABLE names its folder.

    It is an environment of its own, so that `-I` holds for it.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / tag / "site-packages"
    shutil.copy(Path(vision_operators.__file__), site)
    start = "import vision_operators; vision_operators.use_torchvision()"
    (site / "installed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{start}\n")
    return python


class Fresh:
    """One such process; it loads a folder and encodes batches as often as it is asked."""

    def __init__(self, python: Path, folder: Path, torchvision: bool) -> None:
        environment = dict(os.environ)
        if not torchvision:
            environment.pop(vision_operators.VARIABLE, None)
        self._errors = (folder / "stderr.txt").open("w+")
        self._out = folder / "found.safetensors"
        self._process = subprocess.Popen(
            [str(python), "-I", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def encode(
        self, folder: Path, batches: Mapping[str, Sequence[Item]], **options: Any
    ) -> dict[str, Tensor]:
        """`"{batch} query"` and `"{batch} document"` -> unit embeddings (n, d), by
        `SentenceTransformer(folder, **options)`, of texts, pictures and dictionaries of both."""
        from safetensors.torch import load_file

        plain = {batch: [_plain(item) for item in items] for batch, items in batches.items()}
        asked = {"folder": str(folder), "batches": plain, "options": options}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({**asked, "out": str(self._out)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it says below what it died of
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the fresh process ended: {self._errors.read()[-2000:]}")
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        self.image_processor = answer["image_processor"]
        return load_file(self._out)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def _plain(item: Item) -> dict[str, str]:
    picture = {} if item.picture is None else {"image": item.picture.name}
    return picture if item.text is None else {"text": item.text, **picture}
