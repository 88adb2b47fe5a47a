"""Reading SAEs of other people: whatever is wrong with a file becomes one line that names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_retriever.errors import UserError, first_line


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not an SAE's settings")
    return config


def positive(path: Path, config: Mapping[str, Any], key: str, most: int | None = None) -> int:
    """A setting that counts something.

    Raises:
        UserError: it is missing, not a positive whole number, or above `most`.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}, not a positive whole number")
    if most is not None and value > most:
        raise UserError(f"{path}: {key} is {value}, but there are {most} concepts")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors ({first_line(error)})") from None


def read_pickle(path: Path) -> Any:
    """What torch.save wrote: tensors in dicts and lists, and nothing that could run code.

    Raises:
        UserError: the file is missing or damaged, or pickles more than tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files make torch and pickle raise almost anything
        raise UserError(
            f"{path}: damaged, or it pickles more than tensors, which is not read because it could "
            "run code; save the SAE's state_dict()"
        ) from None


def take(
    path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, str], **lengths: int
) -> list[Tensor]:
    """The tensors that `shapes` names, in its order and in float32; there must be no others.

    Args:
        path: where they come from.
        tensors: what the file holds.
        shapes: the axes of every tensor, as in {"W_enc": "dc", "b_enc": "c"}.
        lengths: lengths of axes that are known; others are those of the first tensor with the axis.

    Raises:
        UserError: one is missing, unknown, of another shape, not of numbers or damaged (NaN).
    """
    unknown = sorted(str(name) for name in tensors.keys() - shapes.keys())
    if unknown:
        raise UserError(f"{path}: holds {unknown[0]}, which an SAE of this kind does not have")
    return [_checked(path, name, tensors.get(name), axes, lengths) for name, axes in shapes.items()]


def _checked(path: Path, name: str, tensor: Any, axes: str, lengths: dict[str, int]) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path}: no tensor {name}")
    if tensor.ndim == len(axes):
        for axis, length in zip(axes, tensor.shape, strict=True):
            lengths.setdefault(axis, length)
    expected = [lengths.get(axis) for axis in axes]
    if list(tensor.shape) != expected:
        raise UserError(
            f"{path}: {name} is {_by(tensor.shape)}, not {_by(lengths.get(a, a) for a in axes)}"
        )
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {name} is {tensor.dtype}, not a floating-point tensor")
    if bool(tensor.isnan().any()):
        raise UserError(f"{path}: {name} holds NaN; the file is damaged or its training diverged")
    return tensor.float()


def _by(lengths: Iterable[int | str]) -> str:
    return " x ".join(map(str, lengths)) or "one number"


def fold_b_dec(b_enc_c: Tensor, W_enc_dc: Tensor, b_dec_d: Tensor) -> Tensor:
    """The encoder's bias (c,) with which raw x gives u = (x - b_dec) W_enc + b_enc."""
    return (b_enc_c.double() - b_dec_d.double() @ W_enc_dc.double()).float()
