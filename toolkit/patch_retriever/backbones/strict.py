"""Strict loading: no tensor made up at random, and every failure in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError, first_line
from patch_retriever.hub import hub_error

_MISSING = re.compile(r"Package `(\S+)` is required")
"""How transformers says that a processor lacks a package (num2words for SmolVLM)."""
_NAMED = 3
"""How many tensors a line names."""


@contextmanager
def strict_loading(name: str) -> Iterator[None]:
    """Refuse in one line what does not load whole with `from_pretrained` in here.

    transformers fills tensors that a checkpoint lacks with random numbers, and only logs it.

    Raises:
        UserError: tensors are missing or of another shape than the configuration says, a file is
            missing or damaged, a package is missing, or the hub does not give the model.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop("output_loading_info", False)
        # of a wrong shape, transformers' own error tells no names
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = original.__get__(None, cls)(*args, **kwargs)
        check_loaded(name, model, info)
        return (model, info) if asked else model

    # sentence-transformers has no way to ask for the loading info
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files make the libraries raise almost anything
        raise _in_one_line(name, error) from error
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def check_loaded(name: str, model: Any, info: dict[str, Collection[Any]]) -> None:
    """Refuse a model that is partly random; `info` is `from_pretrained`'s loading info.

    Buffers are computed and tied tensors are not listed there, so neither counts as missing, nor
    does BERT's pooler, which many checkpoints lack and no feature extraction reads.

    Raises:
        UserError: tensors are missing or have another shape.
    """
    if wrong := sorted(info["mismatched_keys"]):
        named = [
            f"{key} {list(found)} for {list(expected)}" for key, found, expected in wrong[:_NAMED]
        ]
        raise UserError(
            f"{name}: {_count(wrong, 'another shape than config.json says')} ({_list(named, wrong)}"
            "); weights and configuration are of different models"
        )
    parameters = {key for key, _ in model.named_parameters()}
    missing = sorted(
        key for key in info["missing_keys"] if key in parameters and not key.startswith("pooler.")
    )
    if missing:
        raise UserError(
            f"{name}: {_count(missing, 'no values in its files')} "
            f"({_list(missing[:_NAMED], missing)}); fetch or save the whole model again"
        )


def _count(tensors: Collection[Any], have: str) -> str:
    n = len(tensors)
    return f"{n} tensor{'' if n == 1 else 's'} {'has' if n == 1 else 'have'} {have}"


def _list(named: list[str], of: Collection[Any]) -> str:
    return ", ".join(named) + (", ..." if len(of) > len(named) else "")


def _in_one_line(name: str, error: Exception) -> UserError:
    """What the libraries say about a model that does not load, and what to do."""
    if (said := hub_error(name, error)) is not None:
        return said
    text = str(error)
    if "orchvision" in text:  # "the Torchvision library", "operator torchvision::nms"
        return UserError(
            f"{name}: its processor needs torchvision; `pip install torchvision`, the build that "
            f"fits torch {version('torch')} (see https://pytorch.org/get-started)"
        )
    if package := _MISSING.search(text):
        return UserError(f"{name}: its processor needs {package[1]}; `pip install {package[1]}`")
    if "accelerate" in text:
        return UserError(f"{name}: a device map needs accelerate; `pip install accelerate`")
    if "device_map" in text:
        return UserError(f"{name}: a device map that does not fit ({first_line(error)})")
    if "attention" in text.lower():
        return UserError(
            f"{name}: that attention cannot be used ({first_line(error)}); leave it out for "
            "transformers' choice"
        )
    if "load image processor" in text:
        return no_image_part(name)
    reason = _damage(Path(name)) or first_line(error)
    return UserError(f"{name}: cannot be loaded as a model ({reason})")


def no_image_part(name: str) -> UserError:
    """For a model that takes images whose processor does not."""
    return UserError(
        f"{name}: its processor has no image part; copy processor_config.json or "
        "preprocessor_config.json from the model that it was made of"
    )


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder's safetensors, if anything is."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
        if absent := sorted(shards - names):
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            return f"{absent[0]}{more}, which {index.name} names, missing: fetch it again"
    for name in sorted(names):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{name} is damaged, fetch it again: {first_line(error)}"
    return None
