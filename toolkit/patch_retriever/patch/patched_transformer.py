"""Patched in the middle of the model: sentence-transformers modules that travel with an export.

This file is copied into every export whose patch changes the residual stream after decoder layers,
and `modules.json` names its classes. It needs sentence-transformers alone, and it runs only where
`trust_remote_code=True` is given. `encode(..., patch=False)` gives the model without its patch.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Module, Transformer
from torch import Tensor, nn

READOUT = "readout"
"""What stands in place of a layer for the subtraction where tokens are read."""


class _InFloat32(nn.Module):
    """Buffers keep float32 when the model around them is cast: a patch stretches some directions so
    far that half of its digits would show."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self


class Subtraction(_InFloat32):
    """h - sum_i a_i z_i(h) d_i with z_i = u_i [u_i > threshold_i], in float32.

    With `epsilon`, u is computed from standardised tokens, x = (h - mean) / (std + epsilon), and
    z_i = std u_i [u_i > threshold_i].
    """

    FIELDS = ("strength_m", "W_enc_dm", "b_enc_m", "threshold_m", "W_dec_md")
    EPSILON = "epsilon"
    """The tensor that is there only where every token has a scale of its own."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in self.FIELDS:
            self.register_buffer(name, tensors[name].float())
        if self.EPSILON in tensors:
            self.register_buffer(self.EPSILON, tensors[self.EPSILON].float())

    def forward(self, h_ntd: Tensor) -> Tensor:
        """Patched activations (..., d), in float32."""
        strength_m, W_enc_dm, b_enc_m, threshold_m, W_dec_md = (
            getattr(self, name).to(h_ntd.device) for name in self.FIELDS
        )
        x_ntd = h_ntd = h_ntd.float()
        epsilon = self._buffers.get(self.EPSILON)
        if epsilon is not None:
            std_nt1 = h_ntd.std(-1, keepdim=True)
            x_ntd = (h_ntd - h_ntd.mean(-1, keepdim=True)) / (std_nt1 + epsilon.to(h_ntd.device))
        u = x_ntd @ W_enc_dm + b_enc_m
        removed_ntd = (u * (u > threshold_m) * strength_m) @ W_dec_md
        return h_ntd - (removed_ntd if epsilon is None else removed_ntd * std_nt1)


@dataclass(frozen=True)
class _Call:
    """The forward pass that is running: whose it is, whether patched, and where it may end."""

    owner: PatchedTransformer
    patch: bool
    last_layer: int | None


_running: ContextVar[_Call | None] = ContextVar("patched_transformer", default=None)
"""By thread, so that several may encode with one model."""


class _Reached(Exception):
    """Raised after the last layer that is needed, with its output."""

    def __init__(self, tokens_ntd: Tensor) -> None:
        super().__init__("the last layer that is needed")
        self.tokens_ntd = tokens_ntd


class PatchedTransformer(Transformer):
    """A `Transformer` with a `Subtraction` after some decoder layers, felt by all later ones.

    `subtractions` are by the layer's number as a string, and by `READOUT` for the tokens that the
    pooling gets. `decoder_layers` is the layers' path in the model. With `keep_raw` the pooling
    also gets the tokens before the subtraction at the readout, beside the others: [patched; raw].
    """

    TENSORS = "patched_transformer.safetensors"
    config_keys: list[str] = [*Transformer.config_keys, "decoder_layers", "keep_raw"]  # noqa: RUF012
    forward_kwargs: set[str] = {*Transformer.forward_kwargs, "patch"}  # noqa: RUF012

    def __init__(
        self, *args: Any, decoder_layers: str = "", keep_raw: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_patch(decoder_layers, {}, keep_raw)

    def set_patch(
        self, decoder_layers: str, subtractions: dict[str, Subtraction], keep_raw: bool
    ) -> None:
        """What is subtracted, and where; to be called once."""
        self.decoder_layers, self.keep_raw = decoder_layers, keep_raw
        self.subtractions = nn.ModuleDict(subtractions)
        layers: Any = self.model.get_submodule(decoder_layers)
        for number, layer in enumerate(layers):
            # first of all hooks: whatever else looks at a layer sees it patched
            layer.register_forward_hook(partial(self._after, number), prepend=True)

    def _after(self, number: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        call = _running.get()
        if call is None or call.owner is not self:
            return None
        h_ntd = output[0] if isinstance(output, tuple) else output
        patched = call.patch and str(number) in self.subtractions
        if patched:
            h_ntd = self.subtractions[str(number)](h_ntd).to(h_ntd.dtype)
        if number == call.last_layer:
            raise _Reached(h_ntd)
        if not patched:
            return None
        return (h_ntd, *output[1:]) if isinstance(output, tuple) else h_ntd

    def preprocess(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `Transformer.preprocess`; the switch is not for the processor."""
        kwargs.pop("patch", None)
        return super().preprocess(*args, **kwargs)

    def forward(self, features: dict[str, Any], patch: bool = True, **kwargs: Any) -> Any:
        """As `Transformer.forward`, patched or not; no layer after the readout's runs."""
        modality = self.modality_config[features.get("modality", "text")]
        match modality["method_output_name"]:
            case ["hidden_states", index]:  # [0] are the embeddings
                last_layer = index - 1
            case _:
                last_layer = None
        pictures = features.get("pixel_values")
        if torch.is_tensor(pictures):  # Chameleon takes them in its own dtype alone
            features = {**features, "pixel_values": pictures.to(self.model.dtype)}
        token = _running.set(_Call(self, patch, last_layer))
        try:
            features = super().forward(features, **kwargs)
        except _Reached as reached:
            features[self.module_output_name] = reached.tokens_ntd
        finally:
            _running.reset(token)
        raw_ntd = tokens_ntd = features[self.module_output_name]
        if patch and READOUT in self.subtractions:
            tokens_ntd = self.subtractions[READOUT](raw_ntd)
        if self.keep_raw:
            tokens_ntd = torch.cat([tokens_ntd, raw_ntd.to(tokens_ntd.dtype)], dim=-1)
        features[self.module_output_name] = tokens_ntd
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """The model as `Transformer` saves it, and the subtractions in a file of their own."""
        super().save(output_path, *args, **kwargs)
        tensors = {k: v.contiguous() for k, v in self.subtractions.state_dict().items()}
        save_file(tensors, Path(output_path) / self.TENSORS)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> PatchedTransformer:
        """What `save` wrote, from a folder or the hub."""
        module = super().load(model_name_or_path, *args, **kwargs)
        path = cls.load_file_path(model_name_or_path, cls.TENSORS, **_where(kwargs))
        if path is None:
            raise FileNotFoundError(f"{model_name_or_path}: {cls.TENSORS} is missing")
        by_site: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(path).items():
            site, field = name.split(".")
            by_site.setdefault(site, {})[field] = tensor
        for site, tensors in by_site.items():
            module.subtractions[site] = Subtraction(tensors)
        module._adapt(model_name_or_path, **_where(kwargs))
        return module

    def _adapt(self, model_name_or_path: str, **where: Any) -> None:
        """Merge the adapter that lies beside the weights, if one does; that needs peft."""
        files = ("adapter_config.json", "adapter_model.safetensors")
        found = [self.load_file_path(model_name_or_path, f"adapter/{f}", **where) for f in files]
        if None in found:
            return
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(self.model, str(Path(str(found[0])).parent))
        adapted.merge_and_unload()
        self.model.__dict__.pop("peft_config", None)  # or the model would be saved as an adapter


class PatchedMaps(_InFloat32, Module):
    """The patch's affine maps on pooled vectors, in float32: one for each role (queries and
    documents, or both alike) and kind (text, image, both, or all alike).

    The pooled vector holds the readout's parts of d entries from each place in `value_at` (a number
    for a single one, in older folders), and from `gate_at` the raw tokens' mean, which tells the
    kinds apart by the two hyperplanes of a gate.
    """

    config_keys: list[str] = ["value_at", "gate_at"]  # noqa: RUF012
    forward_kwargs: set[str] = {"patch", "task"}  # noqa: RUF012
    TENSORS = ("weight_rkde", "bias_rke", "direction_2d", "offset_2")

    def __init__(self, value_at: list[int] | int, gate_at: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.value_at = [value_at] if isinstance(value_at, int) else list(value_at)
        self.gate_at = gate_at
        for name in self.TENSORS:
            self.register_buffer(name, tensors[name].float())

    def forward(
        self, features: dict[str, Any], patch: bool = True, task: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Replaces `sentence_embedding`; everything that is no query is a document."""
        pooled_nw = features["sentence_embedding"].float()
        d = self.direction_2d.shape[1]
        x_nd = torch.cat([pooled_nw[:, at : at + d] for at in self.value_at], dim=1)
        if patch:
            role = 0 if task == "query" else len(self.weight_rkde) - 1
            weight_kde, bias_ke = self.weight_rkde[role], self.bias_rke[role]
            mean_nd = pooled_nw[:, self.gate_at : self.gate_at + d]
            x_nd = self._mapped(x_nd, mean_nd, weight_kde, bias_ke)
        return {**features, "sentence_embedding": x_nd}

    def _mapped(self, x_nd: Tensor, mean_nd: Tensor, weight_kde: Tensor, bias_ke: Tensor) -> Tensor:
        out_ne = x_nd @ weight_kde[0] + bias_ke[0]
        if len(weight_kde) == 1:
            return out_ne
        switch_n2 = mean_nd @ self.direction_2d.T + self.offset_2 > 0
        for k in (0, 1):  # text, then the step to image, then the step to both
            step_ne = x_nd @ (weight_kde[k + 1] - weight_kde[k]) + bias_ke[k + 1] - bias_ke[k]
            out_ne = out_ne + switch_n2[:, k, None] * step_ne
        return out_ne

    def get_embedding_dimension(self) -> int:
        """Of what the maps give."""
        return self.weight_rkde.shape[3]

    def save(
        self, output_path: str, *_args: Any, safe_serialization: bool = True, **_: Any
    ) -> None:
        """`config.json` and `model.safetensors`."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *_args: Any, **kwargs: Any) -> PatchedMaps:
        """What `save` wrote, from a folder or the hub."""
        where = _where(kwargs)
        config = cls.load_config(model_name_or_path, **where)
        return cls(**config, tensors=cls.load_torch_weights(model_name_or_path, **where))


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of what a module is loaded with, what says where its files are."""
    names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
    return {name: kwargs[name] for name in names if name in kwargs}
