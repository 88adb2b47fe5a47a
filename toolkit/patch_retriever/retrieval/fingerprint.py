"""The fingerprint of a model: of its content, wherever it lies and whatever it did before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn


def modules_fingerprint(modules: Iterable[nn.Module]) -> str:
    """SHA-256 of modules: their kinds, settings, tensors, and what turns items into input."""
    digest = hashlib.sha256()
    module: Any
    for module in modules:
        settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        settings.pop("processor_kwargs", None)  # how to load what is hashed below
        config: Any = getattr(module, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else {}
        for where_it_lay in ("_name_or_path", "transformers_version"):
            config.pop(where_it_lay, None)
        said = [type(module).__name__, settings, config]
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy())
        processor: Any = getattr(module, "processor", None) or getattr(module, "tokenizer", None)
        if hasattr(processor, "save_pretrained"):
            with TemporaryDirectory() as folder:
                processor.save_pretrained(folder)
                for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                    digest.update(path.name.encode() + _without_state(path))
    return digest.hexdigest()


def _without_state(path: Path) -> bytes:
    """A processor's file; a tokenizer also saves how it padded and cut its last batch, and one
    that is loaded from such a file says so in its settings."""
    if path.name not in ("tokenizer.json", "tokenizer_config.json"):
        return path.read_bytes()
    values = json.loads(path.read_text())
    if path.name == "tokenizer.json":
        values["padding"] = values["truncation"] = None
    for name in ("backend", "max_length", "pad_to_multiple_of", "pad_token_type_id", "stride"):
        values.pop(name, None)
    values.pop("truncation_strategy", None)
    for side in ("padding_side", "truncation_side"):
        values.setdefault(side, "right")
    return json.dumps(values, sort_keys=True).encode()
