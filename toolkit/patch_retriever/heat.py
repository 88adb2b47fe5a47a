"""Heat: how strongly concepts fire on every word and image patch of an item, and which words and
patches make them fire in the pooled vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.inputs import item_batches, preprocessed
from patch_retriever.backbones.load import as_read
from patch_retriever.backbones.pooling import patched_part, pooling_weights
from patch_retriever.backbones.readout import Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles, image_grids
from patch_retriever.items import Item

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor, nn

    from patch_retriever.sae.model import SparseAutoencoder

_SHADES = " ░▒▓█"


@dataclass(frozen=True)
class TokenHeat:
    """The tokens of one item, without padding, and m concepts' activations on them (or, from
    `token_influence`, the tokens' influence on m concepts)."""

    tokens: list[str]
    """Decoded, one by one; joined they read as the item."""
    roles_t: Tensor
    """uint8, index into `backbones.roles.ROLES`."""
    weights_t: Tensor
    """Weight of each token in the pooled vector: 0 where the readout does not look."""
    codes_tm: Tensor
    """A row a token, a column a concept, in the order asked for."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the image tokens."""

    def patches(self, j: int) -> Tensor | None:
        """Concept j's activations on the image tokens, (h, w); None without an image.

        One row (1, n) where the model's layout of image tokens is not known.
        """
        codes_p = self.codes_tm[self.roles_t == ROLES.index("image"), j]
        if not len(codes_p):
            return None
        return codes_p.reshape(self.grid or (1, -1))

    def to_text(self, j: int) -> str:
        """For a terminal: every word, with concept j's value where it is at least a twentieth of
        the largest; then the image in shades of what is positive."""
        least = float(self.codes_tm[:, j].abs().max()) / 20
        words = []
        for token, role, code in zip(
            self.tokens, self.roles_t.tolist(), self.codes_tm[:, j].tolist(), strict=True
        ):
            if role != ROLES.index("image"):
                words.append(
                    token.replace("\n", "\\n")
                    + (f"[{code:.3g}]" if code and abs(code) >= least else "")
                )
        lines = ["".join(words).strip()]
        if (codes_hw := self.patches(j)) is not None:
            largest = float(codes_hw.max())
            lines.append(f"image, at most {largest:.3g}:" if largest > 0 else "image: nowhere")
            if largest > 0:
                level_hw = (codes_hw.clamp(min=0) / largest * (len(_SHADES) - 1)).round().int()
                rows = ("".join(2 * _SHADES[level] for level in row) for row in level_hw.tolist())
                lines += [f"|{row}|" for row in rows]
        return "\n".join(lines)

    def to_json(self, j: int) -> dict[str, Any]:
        """As plain JSON values, for concept j."""
        patches_hw = self.patches(j)
        return {
            "tokens": self.tokens,
            "roles": [ROLES[role] for role in self.roles_t.tolist()],
            "weights": self.weights_t.tolist(),
            "values": self.codes_tm[:, j].tolist(),
            "patches": None if patches_hw is None else patches_hw.tolist(),
        }


def token_heat(
    transformer: Transformer,
    readout: Readout,
    sae: SparseAutoencoder,
    items: Sequence[Item],
    concepts: Tensor,
    batch_size: int = 64,
) -> list[TokenHeat]:
    """Activations of the m `concepts` (numbers in the SAE) on every token of every item.

    Of the unpatched model, at the readout's site.
    """
    transformer = as_read(transformer, readout)
    roles_of = TokenRoles(transformer)
    found: dict[int, TokenHeat] = {}
    for numbers, features in item_batches(transformer, items, batch_size):
        with torch.no_grad():
            tokens_ntd = transformer(dict(features))["token_embeddings"].float()
        mask_nt = features["attention_mask"].bool()
        weights_nt = pooling_weights(mask_nt, patched_part(readout.pooling))
        roles_nt = roles_of(features)
        grids = image_grids(transformer.config, features)
        for row, number in enumerate(numbers):
            real_t = mask_nt[row]
            x_td = tokens_ntd[row, real_t].to(sae.W_enc_dc.device)
            found[number] = TokenHeat(
                _pieces(transformer.tokenizer, features["input_ids"][row, real_t].tolist()),
                roles_nt[row, real_t.cpu()],
                weights_nt[row, real_t].cpu(),
                sae.encode_some(x_td, concepts.to(x_td.device)).cpu(),
                grids[row],
            )
    return [found[number] for number in range(len(items))]


def token_influence(
    transformer: Transformer,
    readout: Readout,
    sae: SparseAutoencoder,
    items: Sequence[Item],
    concepts: Tensor,
    batch_size: int = 64,
) -> list[TokenHeat]:
    """What each concept's activation in the pooled vector loses when one token is hidden.

    A token is hidden, one at a time, by giving it the mean of the item's token embeddings before
    the first decoder layer; what it had itself in the pooled vector counts as lost, too. Under a
    last-token readout the concepts of an embedding fire on the last token and often nowhere else:
    this says which words and patches made them fire. Costs a forward pass for every token.
    """
    transformer = as_read(transformer, readout)
    heats = token_heat(transformer, readout, sae, items, concepts, batch_size)
    first = transformer.model.get_submodule(f"{layers_path(transformer.model)}.0")
    found = []
    for item, heat in zip(items, heats, strict=True):
        loaded, left = item.load(), []
        for hidden_b in torch.arange(len(heat.tokens)).split(batch_size):
            features = preprocessed(transformer, [loaded] * len(hidden_b))
            handle = first.register_forward_pre_hook(_hiding(hidden_b))
            try:
                with torch.no_grad():
                    tokens_btd = transformer(features)["token_embeddings"].float()
            finally:
                handle.remove()
            x_nd = tokens_btd.flatten(0, 1).to(sae.W_enc_dc.device)
            codes_nm = sae.encode_some(x_nd, concepts.to(x_nd.device)).cpu()
            codes_btm = codes_nm.unflatten(0, tokens_btd.shape[:2])
            weights_bt = heat.weights_t.repeat(len(hidden_b), 1)
            weights_bt[torch.arange(len(hidden_b)), hidden_b] = 0
            left.append(torch.einsum("bt,btm->bm", weights_bt, codes_btm))
        found.append(replace(heat, codes_tm=heat.weights_t @ heat.codes_tm - torch.cat(left)))
    return found


def _hiding(hidden_b: Tensor) -> Callable[[nn.Module, Any], tuple[Any, ...]]:
    """A hook that hides token `hidden_b[b]` of row b from the decoder layers."""

    def hide(_: nn.Module, args: Any) -> tuple[Any, ...]:
        embeddings_btd = args[0].clone()
        embeddings_btd[torch.arange(len(hidden_b)), hidden_b] = args[0].mean(1)
        return embeddings_btd, *args[1:]

    return hide


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Every token as text of its own."""
    pieces = []
    for token, raw in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        piece = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # SentencePiece marks the start of a word, which decoding a token alone drops
        marked = raw.startswith("▁") and not piece.startswith(" ")
        pieces.append(" " + piece if marked else piece)
    return pieces
