"""PatchedRetriever: the live model, whose forward pass runs the patch through nnsight."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers import SentenceTransformer

from patch_retriever.backbones.inputs import pool, pooling_weights
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import apply_maps
from patch_retriever.probe import Probe

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor


class PatchedRetriever(SentenceTransformer):
    """A `SentenceTransformer` that can be switched between base and patched, call by call.

    `encode` and its kin take two more arguments:

    - `patch=False` runs the backbone as it is;
    - `keep_concepts=[...]` leaves those concepts (numbers in the SAE) in.

    For research and checks; what is served is the exported folder, which needs no nnsight. One
    process and thread per live model (nnsight is not thread-safe).

        retriever = PatchedRetriever.from_folder("my-patched-retriever")
        before, after = retriever.encode(x, patch=False), retriever.encode(x)
    """

    def __init__(self, backbone: SentenceTransformer, patch: Patch) -> None:
        super().__init__(modules=list(backbone), device=str(backbone.device))
        self.patch = patch
        # not a child module: an nn.Sequential would run it
        self.__dict__["_probe"] = Probe(cast("Transformer", self[0]), self[1])

    @classmethod
    def from_folder(cls, folder: Path | str, device: str = "cpu") -> PatchedRetriever:
        """The live twin of an exported folder: its backbone and readout, its patch live.

        Raises:
            UserError: the folder was not written by patch-retriever.
        """
        patch = Patch.load(Path(folder) / "patch")
        if "readout" not in patch.about:
            raise UserError(f"{folder}: its patch does not say which readout it belongs to")
        readout = Readout.from_json(patch.about["readout"])
        return cls(with_readout(load_backbone(str(folder), device=device), readout), patch)

    def get_model_kwargs(self) -> list[str]:
        """The arguments of `encode` that reach the forward pass."""
        return sorted({*super().get_model_kwargs(), "patch", "keep_concepts", "task"})

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """As `SentenceTransformer.preprocess`; the patch's switches are not for the processor."""
        passed = {k: v for k, v in kwargs.items() if k not in ("patch", "keep_concepts")}
        return super().preprocess(inputs, prompt=prompt, **passed)

    def forward(
        self,
        input: dict[str, Any],
        patch: bool = True,
        keep_concepts: Collection[int] = (),
        task: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One preprocessed batch to unit embeddings, with or without the patch."""
        if not patch:
            return super().forward(input, **kwargs)
        subtract, keep_m = self.patch.subtract, None
        if subtract is not None and keep_concepts:
            keep_m = torch.isin(subtract.concepts_m, torch.tensor(sorted(keep_concepts)))
        role = QUERY if task == "query" else DOCUMENT
        weights_nt = pooling_weights(input["attention_mask"], "mean")
        raw: dict[str, Tensor] = {}  # what the gate sees: before any patch

        def subtract_tokens(h_ntd: Tensor) -> Tensor:
            raw["mean_nd"] = pool(h_ntd, weights_nt)
            return h_ntd if subtract is None else subtract(h_ntd, keep_m)

        def correct(x_nd: Tensor) -> Tensor:
            return apply_maps(self.patch.maps, self.patch.gate, x_nd, raw["mean_nd"], role)

        probe: Probe = self.__dict__["_probe"]
        out = probe.run(input, {LAST: subtract_tokens, "pooled": correct})
        return self[2](out)
