"""The patch: operators in order, with their statistics, the site and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_retriever.backbones.readout import LAST, layer_number
from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.files import write_json, write_tensors
from patch_retriever.patch.operators import Affine, Gate, Subtract, apply_maps
from patch_retriever.sae.scale import InputScale

CONFIG, TENSORS = "patch.json", "patch.safetensors"
FORMAT = 3
"""2 for a patch without a scale per token, 1 for one without `layers` either: older versions read
what they know."""

QUERY, DOCUMENT = 0, 1


@dataclass(frozen=True)
class Patch:
    """`subtract` on the tokens at `site`, then, after pooling, `maps` in order.

    `site` is the readout's: `last_hidden_state` or `layers.N`. `layers` says what is subtracted
    before it, from the residual stream after decoder layers (`layers.N`): later layers see it gone.
    `subtract`, `gate` and `maps` are of the model that is patched so. `gate` is there where a map
    has statistics per modality. `about` says how the patch was made (free JSON: readout, selected
    concepts with reasons, settings, data).
    """

    site: str
    subtract: Subtract | None = None
    maps: tuple[Affine, ...] = ()
    gate: Gate | None = None
    about: dict[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Subtract] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.layers:
            if self.site != LAST and layer_number(site) >= layer_number(self.site):
                raise ValueError(f"a subtraction at {site} is not before the readout, {self.site}")
        if self.gated and self.gate is None:
            raise ValueError("a map with statistics per modality needs a gate")

    @property
    def gated(self) -> bool:
        """Whether a map has statistics per modality, so that the gate is asked."""
        return any(step.by == "modality" for step in self.maps)

    @property
    def strengths(self) -> dict[int, float]:
        """How much of each concept is subtracted, for those of which anything is; where that is at
        several sites, at the last."""
        return {
            int(concept): float(strength)
            for subtract in self.subtractions.values()
            for concept, strength in zip(subtract.concepts_m, subtract.strength_m, strict=True)
        }

    @property
    def subtractions(self) -> dict[str, Subtract]:
        """All of them by their sites, in the order of the forward pass."""
        found = {site: self.layers[site] for site in sorted(self.layers, key=layer_number)}
        return found if self.subtract is None else {**found, self.site: self.subtract}

    @property
    def why(self) -> str:
        """The method that made the patch, and its reason where it gives another."""
        method, reason = self.about.get("method", ""), self.about.get("reason", "")
        return f"{method}: {reason}" if reason not in ("", method) else method

    def embed(self, features: Features, role: int) -> Tensor:
        """Unit embeddings (n, e) of items as queries or documents, from their features: those of
        the model with `layers` patched."""
        return self._mapped(self._subtracted(features), features, role)

    def embed_both(self, features: Features) -> tuple[Tensor, Tensor]:
        """The same as queries and as documents; one tensor where roles make no difference."""
        x_nd = self._subtracted(features)
        as_query_ne = self._mapped(x_nd, features, QUERY)
        if all(step.by != "role" for step in self.maps):
            return as_query_ne, as_query_ne
        return as_query_ne, self._mapped(x_nd, features, DOCUMENT)

    def _subtracted(self, features: Features) -> Tensor:
        if self.subtract is None:
            return features.pooled_nd
        return self.subtract.on_pooled(features.pooled_nd, features.codes)

    def _mapped(self, x_nd: Tensor, features: Features, role: int) -> Tensor:
        out_ne = apply_maps(self.maps, self.gate, x_nd, features.mean_nd, role)
        return torch.nn.functional.normalize(out_ne, dim=1)

    def save(self, folder: Path) -> None:
        """Write `patch.safetensors` and `patch.json`."""
        tensors: dict[str, Tensor] = {}
        operators: list[dict[str, str]] = []
        for site, subtract in self.subtractions.items():
            at = {"site": site} if site in self.layers else {}
            how = {} if subtract.input_scale == "none" else {"input_scale": subtract.input_scale}
            operators.append({"kind": "subtract", **at, **how})
            tensors |= {f"{_prefix(at)}{k}": v for k, v in subtract.tensors.items()}
        for i, step in enumerate(self.maps):
            operators.append({"kind": "affine", "name": step.name, "by": step.by})
            tensors |= {f"map{i}.weight_gde": step.weight_gde, f"map{i}.bias_ge": step.bias_ge}
        gate = None
        if self.gate is not None:
            tensors |= {
                "gate.direction_2d": self.gate.direction_2d,
                "gate.offset_2": self.gate.offset_2,
            }
            gate = {"margin": self.gate.margin, "error": self.gate.error}
        # an empty file is no safetensors: the identity patch still has its site
        write_tensors(folder / TENSORS, tensors or {"none": torch.zeros(1)})
        scaled = any(s.input_scale != "none" for s in self.subtractions.values())
        version = FORMAT if scaled else 2 if self.layers else 1
        values = {"format": version, "site": self.site, "operators": operators, "gate": gate}
        write_json(folder / CONFIG, {**values, "about": self.about})

    @classmethod
    def load(cls, folder: Path | str) -> Patch:
        """Read a patch that `save` wrote.

        Raises:
            UserError: there is no patch, it is damaged, or it is of a newer format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder}: no patch here ({CONFIG} is missing)")
        try:
            values = json.loads((folder / CONFIG).read_text())
            if values["format"] > FORMAT:
                raise UserError(f"{folder}: written by a newer patch-retriever; upgrade it")
            tensors = load_file(folder / TENSORS)
            kinds = [operator["kind"] for operator in values["operators"]]
            if unknown := set(kinds) - {"subtract", "affine"}:
                raise ValueError(f"unknown operators {sorted(unknown)}")
            subtract, layers = None, {}
            for operator in values["operators"]:
                if operator["kind"] == "subtract":
                    rows = _with_prefix(tensors, _prefix(operator))
                    found = Subtract(**rows, input_scale=_input_scale(operator))
                    if "site" in operator:
                        layers[operator["site"]] = found
                    else:
                        subtract = found
            affine = [operator for operator in values["operators"] if operator["kind"] == "affine"]
            maps = tuple(
                Affine(
                    o["name"], o["by"], tensors[f"map{i}.weight_gde"], tensors[f"map{i}.bias_ge"]
                )
                for i, o in enumerate(affine)
            )
            gate = None
            if values["gate"] is not None:
                about = values["gate"]  # older patches were made where there was no error
                gate = Gate(
                    tensors["gate.direction_2d"],
                    tensors["gate.offset_2"],
                    about["margin"],
                    about.get("error", 0.0),
                )
            return cls(values["site"], subtract, maps, gate, values["about"], layers)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder}: a damaged patch ({error}); build it again") from None


def _prefix(operator: Mapping[str, str]) -> str:
    """How the names of a subtraction's tensors begin."""
    return f"{operator.get('site', 'subtract')}."


def _input_scale(operator: Mapping[str, str]) -> InputScale:
    """Of a subtraction; patches from before there was a choice do not say it."""
    match operator.get("input_scale", "none"):
        case "none" | "token" as scale:
            return scale
        case other:
            raise ValueError(f"unknown input scale {other!r}")


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
