"""A trained adapter on disk, in peft's own layout, and in a backbone's weights."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError, first_line
from patch_retriever.files import allow_reading, value_hash, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor, nn

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "adapter.json"
FOLDER = "adapter"
"""Where an export has its adapter, if it keeps it beside the base's weights."""


def save_adapter(peft_model: PeftModel, folder: Path, base: str, about: dict[str, Any]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained`
    reads them, and `adapter.json`: `about`, and a fingerprint of the weights it was trained on.

    `base` is a hub id, or a local folder, which is said relative to the adapter's.
    """
    (config,) = peft_model.peft_config.values()
    config.base_model_name_or_path = relative_base(base, folder)
    config.inference_mode = True
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card, of blanks to be filled in
    allow_reading(folder / WEIGHTS)
    fingerprint = base_fingerprint(peft_model.get_base_model(), _adapted(peft_model))
    write_json(folder / ABOUT, {**about, "base": base, "base_fingerprint": fingerprint})


def relative_base(base: str, folder: Path) -> str:
    """How an adapter in `folder` names its base: a folder by the way there, a hub id as it is."""
    return os.path.relpath(base, folder) if Path(base).exists() else base


def copy_adapter(
    source: Path, folder: Path, base: str, about: dict[str, Any] | None = None
) -> None:
    """Copy an adapter whose base is found at `base`, as seen from its new `folder`; `about` for
    another `adapter.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = check_adapter(source) if about is None else about
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    config = json.loads((source / CONFIG).read_text())
    write_json(folder / CONFIG, {**config, "base_model_name_or_path": base})
    write_json(folder / ABOUT, about)


def check_adapter(folder: Path) -> dict[str, Any]:
    """What `adapter.json` says, of a folder that holds a whole adapter.

    Raises:
        UserError: it holds none, or a damaged one.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no adapter here ({name} is missing)")
    try:
        json.loads((folder / CONFIG).read_text())
        path = folder / ABOUT
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: a damaged adapter ({first_line(error)})") from None


def inject(transformer: Transformer, folder: Path) -> PeftModel:
    """The saved adapter in the backbone's modules, not merged; `unload` takes it out again.

    Raises:
        UserError: there is none, it is damaged, or it was made for another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    about = check_adapter(folder)
    model: Any = transformer.model
    try:
        with warnings.catch_warnings():  # peft asks in a way that transformers deprecates
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError, OSError) as error:
        _take_out(model)
        raise UserError(
            f"{folder}: this adapter does not fit {type(model).__name__} "
            f"({first_line(error)}); it was made for {about.get('base', 'another base')}"
        ) from None
    expected = about.get("base_fingerprint")
    found = base_fingerprint(peft_model.get_base_model(), _adapted(peft_model))
    if expected is not None and expected != found:
        unload(peft_model)
        raise UserError(
            f"{folder}: this adapter was made for other weights ({about.get('base')}); give the "
            "model that it was trained on"
        )
    peft_model.requires_grad_(False)
    return peft_model


def check_fits(transformer: Transformer, folder: Path) -> None:
    """Refuse an adapter that is not for this backbone.

    Raises:
        UserError: there is none, it is damaged, or it was made for another base.
    """
    unload(inject(transformer, folder))


def unload(peft_model: PeftModel) -> None:
    """Take an adapter out of the modules: they and their weights are as they were before it."""
    peft_model.unload()
    _forget(peft_model.get_base_model())


class Merged:
    """The context in which a backbone has an adapter in its weights; afterwards it is as it was,
    bit for bit. It may be entered again inside itself. Only adapted weights are there twice."""

    def __init__(self, transformer: Transformer, folder: Path) -> None:
        self._transformer, self._folder = transformer, folder
        self._depth = 0
        self._before: dict[tuple[str, str], Tensor] = {}

    def __enter__(self) -> None:
        """Merge.

        Raises:
            UserError: there is no adapter, it is damaged, or it was made for another base.
        """
        if self._depth == 0:
            self._before = merge(self._transformer, self._folder)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for (path, name), values in self._before.items():
                module = self._transformer.model.get_submodule(path)
                module.get_parameter(name).data = values
            self._before = {}


def merge(transformer: Transformer, folder: Path) -> dict[tuple[str, str], Tensor]:
    """Put an adapter into a backbone's weights; returns those it changed, as they were, by module
    and name.

    Raises:
        UserError: there is no adapter, it is damaged, or it was made for another base.
    """
    peft_model = inject(transformer, folder)
    model: Any = peft_model.get_base_model()
    before = {
        (path, name): parameter.detach().clone()
        for path in _adapted(peft_model)
        for name, parameter in model.get_submodule(path).get_base_layer().named_parameters()
    }
    peft_model.merge_and_unload()
    _forget(model)
    return before


def base_fingerprint(model: nn.Module, paths: list[str]) -> str:
    """Of the weights that are adapted: their shapes and first rows, whatever dtype they are in."""
    import torch

    found = []
    for path in paths:
        module: Any = model.get_submodule(path)
        weight = getattr(module, "base_layer", module).weight
        row = weight[0].detach().to(torch.bfloat16).view(torch.int16).cpu().numpy()
        found.append([path, list(weight.shape), row.tobytes().hex()])
    return value_hash(found)


def _adapted(peft_model: PeftModel) -> list[str]:
    """Names of the modules that hold an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = peft_model.get_base_model()
    return sorted(n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))


def _take_out(model: nn.Module) -> None:
    """Undo an injection that did not succeed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for path, layer in layers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    _forget(model)


def _forget(model: Any) -> None:
    """Drop what peft leaves on a model, which would warn at the next adapter and be saved."""
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)
