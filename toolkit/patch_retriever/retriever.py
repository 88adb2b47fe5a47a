"""PatchedRetriever: the live model, whose forward pass runs the patch through nnsight."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from sentence_transformers import SentenceTransformer

from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import LAST, PoolingMode, Readout
from patch_retriever.errors import UserError
from patch_retriever.explain import Explanation, check_sae, explain_pair, pool_item
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import apply_maps
from patch_retriever.probe import Probe
from patch_retriever.sae.formats import load_sae
from patch_retriever.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from torch import Tensor


class PatchedRetriever(SentenceTransformer):
    """A `SentenceTransformer` that can be switched between base and patched, call by call.

    `encode` and its kin take two more arguments:

    - `patch=False` runs the backbone as it is;
    - `keep_concepts=[...]` leaves those concepts (numbers in the SAE) in.

    `explain` takes one similarity apart. For that it needs the whole SAE that the patch was made
    with, as `sae`: the SAE, or its folder or hub id, which is read when it is first needed.

    For research and checks; what is served is the exported folder, which needs no nnsight. One
    process and thread per live model (nnsight is not thread-safe).

        retriever = PatchedRetriever.from_folder("my-patched-retriever")
        before, after = retriever.encode(x, patch=False), retriever.encode(x)
        print(retriever.explain("a red star", Image.open("star.png")).to_text())
    """

    def __init__(
        self,
        backbone: SentenceTransformer,
        patch: Patch,
        sae: SparseAutoencoder | Path | str | None = None,
    ) -> None:
        prompts = {name: said for name, said in backbone.prompts.items() if said is not None}
        super().__init__(modules=list(backbone), device=str(backbone.device), prompts=prompts)
        self.patch = patch
        # not child modules: an nn.Sequential would run them
        self.__dict__["_probe"] = Probe(cast("Transformer", self[0]), self[1])
        self.__dict__["_sae"] = sae
        if isinstance(sae, SparseAutoencoder):
            self._check(sae, "the SAE")

    @classmethod
    def from_folder(
        cls, folder: Path | str, device: str = "cpu", sae: Path | str | None = None
    ) -> PatchedRetriever:
        """The live twin of an exported folder: its backbone and readout, its patch live.

        The SAE is the one in the folder's `run/sae`, if it is there, unless `sae` names another.

        Raises:
            UserError: the folder was not written by patch-retriever.
        """
        patch = Patch.load(Path(folder) / "patch")
        if "readout" not in patch.about:
            raise UserError(f"{folder}: its patch does not say which readout it belongs to")
        readout = Readout.from_json(patch.about["readout"])
        built = Path(folder) / "run" / "sae"
        if sae is None and built.is_dir():
            sae = built
        return cls(with_readout(load_backbone(str(folder), device=device), readout), patch, sae)

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

        def subtract_tokens(h_ntd: Tensor) -> Tensor:  # patches are float32, backbones may be less
            raw["mean_nd"] = pool(h_ntd, weights_nt)
            return h_ntd if subtract is None else subtract(h_ntd.float(), keep_m)

        def correct(x_nd: Tensor) -> Tensor:
            return apply_maps(self.patch.maps, self.patch.gate, x_nd.float(), raw["mean_nd"], role)

        probe: Probe = self.__dict__["_probe"]
        out = probe.run(input, {LAST: subtract_tokens, "pooled": correct})
        return self[2](out)

    @property
    def sae(self) -> SparseAutoencoder:
        """The whole SAE that the patch was made with, on the CPU.

        Raises:
            UserError: none is known, it cannot be read, or it is another one.
        """
        sae = self.__dict__["_sae"]
        if sae is None:
            raise UserError(
                "an explanation needs the whole SAE, and a patch holds only rows of it; name the "
                "SAE's folder or hub id (--sae, or sae= in Python): a build leaves it in run/sae"
            )
        if not isinstance(sae, SparseAutoencoder):
            loaded = load_sae(sae)
            self._check(loaded, str(sae))
            self.__dict__["_sae"] = sae = loaded
        return sae

    def _check(self, sae: SparseAutoencoder, source: str) -> None:
        width = cast("Transformer", self[0]).get_embedding_dimension()
        check_sae(sae, self.patch, width, source)

    def explain(self, a: Any, b: Any) -> Explanation:
        """The similarity of the query `a` and the document `b`, before and after the patch, as a
        sum over concepts, geometry and residual.

        Args:
            a: a query as `encode_query` takes it: a text, a picture, or `{"image", "text"}`.
            b: a document as `encode_document` takes it.

        Raises:
            UserError: there is no SAE, or not the patch's, or the pooling is not linear.
        """
        sae, pooling = self.sae, cast("Pooling", self[1]).pooling_mode
        if pooling not in get_args(PoolingMode):
            raise UserError(
                f"a similarity under {pooling} pooling is no sum of parts; use the mean"
            )
        items = []
        for encode, item in ((self.encode_query, a), (self.encode_document, b)):
            encoded: Any = encode([item], patch=False, output_value=None, show_progress_bar=False)
            tokens_td, mask_t = (
                encoded[0][k].cpu() for k in ("token_embeddings", "attention_mask")
            )
            items.append(pool_item(tokens_td, mask_t, cast("PoolingMode", pooling), sae))
        return explain_pair(self.patch, sae, *items)
