"""Which modules of a backbone an adapter changes, and the peft configuration that says so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.backbones.families import layers_path
from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

PROJECTORS = ("multi_modal_projector", "visual.merger", "connector", "embed_vision")
"""Where families keep what turns picture features into the language model's embeddings."""
_KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv")
_LAST_OF_MLP = ("down_proj", "fc2", "w2", "dense_4h_to_h")


def adapter_config(model: nn.Module, settings: AdapterSettings) -> PeftConfig:
    """The peft configuration for a headless backbone: every linear layer of its decoder layers (of
    IA3: keys, values and the MLP's last one), and of its projector where that is asked for.

    Raises:
        UserError: there are none.
    """
    from peft import IA3Config, LoraConfig

    found = target_modules(model, settings)
    if settings.method == "ia3":
        last = [name for name in found if name.rpartition(".")[2] in _LAST_OF_MLP]
        return IA3Config(target_modules=_one_of(found), feedforward_modules=_one_of(last))
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,  # type: ignore[arg-type] # peft divides it
        target_modules=_one_of(found),
        use_dora=settings.method == "dora",
    )


def target_modules(model: nn.Module, settings: AdapterSettings) -> list[str]:
    """Names of the linear layers that are adapted.

    Raises:
        UserError: there are none.
    """
    name = type(model).__name__
    layers = layers_path(model)
    found = _linear(model, layers)
    if settings.method == "ia3":
        wanted = (*_KEYS_AND_VALUES, *_LAST_OF_MLP)
        found = [path for path in found if path.rpartition(".")[2] in wanted]
    if not found:
        hint = "use lora" if settings.method == "ia3" else "this family can't be adapted yet"
        raise UserError(
            f"{name}: no target module for {settings.method} found in {layers!r}; {hint}"
        )
    if settings.projector and settings.method != "ia3":
        projectors = [path for path in PROJECTORS if _has(model, path)]
        in_projector = [one for path in projectors for one in _linear(model, path)]
        if not in_projector:
            raise UserError(
                f"{name}: no target module found in a projector ({', '.join(PROJECTORS)}); leave "
                "the projector out"
            )
        found += in_projector
    return found


def _linear(model: nn.Module, path: str) -> list[str]:
    from torch import nn

    part: Any = model.get_submodule(path)
    inside = [(path, part), *((f"{path}.{n}", m) for n, m in part.named_modules() if n)]
    return [name for name, module in inside if isinstance(module, nn.Linear)]


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def _one_of(names: list[str]) -> str:
    """A pattern for exactly these; numbers of layers, which all have the same, are any."""
    patterns = dict.fromkeys(re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in names)
    return "|".join(patterns)
