"""PatchedRetriever: the live model, whose forward pass runs the patch through nnsight."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from sentence_transformers import SentenceTransformer

from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.load import load_backbone, readout_site, with_readout
from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import PoolingMode, Readout, layer_number
from patch_retriever.errors import UserError
from patch_retriever.explain import Explanation, check_sae, explain_pair, pool_item
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.deep import needs_code
from patch_retriever.patch.export import token_modules
from patch_retriever.patch.operators import Subtract, apply_composed, compose
from patch_retriever.probe import Edit, Probe
from patch_retriever.sae.formats import load_sae
from patch_retriever.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import torch
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from torch import Tensor, nn


class PatchedRetriever(SentenceTransformer):
    """A `SentenceTransformer` that can be switched between base and patched, call by call.

    `encode` and its kin take two more arguments:

    - `patch=False` runs the backbone as it is;
    - `keep_concepts=[...]` leaves those concepts (numbers in the SAE) in, at every site.

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
        """Wrap a backbone (`with_readout`); its modules are the caller's, nothing is copied.

        Raises:
            UserError: the patch is for another readout's site or for layers that the backbone does
                not have, or `sae` is not the SAE that it was made with.
        """
        _check_sites(patch, cast("Transformer", backbone[0]))
        prompts = {name: said for name, said in backbone.prompts.items() if said is not None}
        super().__init__(modules=list(backbone), device=str(backbone.device), prompts=prompts)
        self.patch = patch
        # not child modules: an nn.Sequential would run them
        self.__dict__["_probe"] = Probe(cast("Transformer", self[0]))
        self.__dict__["_live"] = self._live_patch()
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
        backbone = with_readout(load_backbone(str(folder), "auto", device), readout)
        return cls(backbone, patch, sae)

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
        live: _Live = self.__dict__["_live"]
        if live.patch is not self.patch:
            self.__dict__["_live"] = live = self._live_patch()
        out = live.run(self.__dict__["_probe"], self[1], input, task, frozenset(keep_concepts))
        return self[2](out)

    def _live_patch(self) -> _Live:
        return _Live(self.patch, needs_code(self.patch, cast("Transformer", self[0])))

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
            UserError: there is no SAE, or not the patch's, or the pooling is not linear, or the
                patch is felt by later layers.
        """
        if self.patch.layers:
            raise UserError(
                f"this patch is felt by all layers after {', '.join(self.patch.layers)}, so that a "
                "similarity is no sum of parts; explain a patch at the readout"
            )
        sae, modes = self.sae, cast("Pooling", self[1]).pooling_mode
        pooling = modes if isinstance(modes, str) else "+".join(modes)
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


class _Live:
    """A patch as it runs live: its tensors where the activations are, its maps as one.

    It computes in float32, whatever the backbone's dtype; a layer gets its own dtype back.
    """

    def __init__(self, patch: Patch, with_code: bool) -> None:
        """`with_code` says that an export of the patch runs code of its own, not stock modules."""
        self.patch, self._with_code = patch, with_code
        self._subtractions = dict(patch.subtractions)
        self._maps: dict[int, tuple[Tensor, Tensor]] = {}
        self._gate = patch.gate if patch.gated else None
        self._stock: tuple[frozenset[int], torch.device, list[nn.Module]] | None = None

    def run(
        self,
        probe: Probe,
        pooling: nn.Module,
        features: dict[str, Any],
        task: str | None,
        keep: frozenset[int],
    ) -> dict[str, Any]:
        """One preprocessed batch to pooled and mapped vectors, not of length 1 yet."""
        site = self.patch.site
        raw: dict[str, Tensor] = {}  # what the gate sees: before the subtraction at the readout

        def at_layer(layer: str) -> Edit:
            return lambda h_ntd: self._subtracted(layer, h_ntd, keep).to(h_ntd.dtype)

        def at_readout(h_ntd: Tensor) -> Tensor:
            raw["tokens_ntd"] = h_ntd
            return self._subtracted(site, h_ntd, keep)

        edits = {layer: at_layer(layer) for layer in self.patch.layers}
        found = probe.read(features, [site], {**edits, site: at_readout})
        out: dict[str, Any] = pooling({**features, "token_embeddings": found[site]})
        x_nd = mean_nd = out["sentence_embedding"].float().clone()
        d = found[site].shape[2]
        if self.patch.subtract is not None and x_nd.shape[1] > d:
            # the second part of a readout of two is of raw tokens
            unpatched = pooling({**features, "token_embeddings": raw["tokens_ntd"]})
            x_nd[:, d:] = unpatched["sentence_embedding"][:, d:].float()
        if self._gate is not None:
            weights_nt = pooling_weights(features["attention_mask"], "mean")
            mean_nd = pool(raw["tokens_ntd"], weights_nt)
        role = QUERY if task == "query" else DOCUMENT
        return {**out, "sentence_embedding": self._mapped(x_nd, mean_nd, role)}

    def _subtracted(self, site: str, h_ntd: Tensor, keep: frozenset[int]) -> Tensor:
        if site not in self._subtractions:
            return h_ntd
        placed = self._subtractions[site] = self._subtractions[site].to(h_ntd.device)
        if self._with_code or site != self.patch.site:
            return placed.keeping(keep)(h_ntd.float())
        features: dict[str, Any] = {"token_embeddings": h_ntd.float()}
        for module in self._stock_modules(placed, keep):
            features = module(features)
        return features["token_embeddings"]

    def _stock_modules(self, subtract: Subtract, keep: frozenset[int]) -> list[nn.Module]:
        """What a stock export runs in place of `subtract`, whose products are then the same to the
        last bit: a code just at its threshold fires in both or in neither."""
        device = subtract.W_dec_md.device
        if self._stock is not None and self._stock[:2] == (keep, device):
            return self._stock[2]
        made = token_modules(subtract.keeping(keep), keep_raw=False)
        modules: list[nn.Module] = [m.to(device).requires_grad_(False) for m in made]
        self._stock = (keep, device, modules)
        return modules

    def _mapped(self, x_nd: Tensor, mean_nd: Tensor, role: int) -> Tensor:
        if not self.patch.maps:
            return x_nd
        if role not in self._maps or self._maps[role][0].device != x_nd.device:
            weight_kde, bias_ke = compose(self.patch.maps, x_nd.shape[1], role)
            self._maps[role] = (weight_kde.to(x_nd.device), bias_ke.to(x_nd.device))
            self._gate = None if self._gate is None else self._gate.to(x_nd.device)
        return apply_composed(*self._maps[role], self._gate, x_nd, mean_nd)


def _check_sites(patch: Patch, transformer: Transformer) -> None:
    """Refuse a patch of another readout, and one for layers that are not there.

    Raises:
        UserError: it is one.
    """
    read_at, n = readout_site(transformer), n_layers(transformer.model)
    if patch.site != read_at:
        raise UserError(f"a patch at {patch.site}, but the backbone is read at {read_at}")
    if missing := [site for site in patch.layers if layer_number(site) >= n]:
        raise UserError(
            f"a patch at {', '.join(missing)}, but the backbone's layers are layers.0 to "
            f"layers.{n - 1}"
        )
