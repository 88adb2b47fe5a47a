"""Why two items are as similar as they are, before and after the patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_retriever.backbones.pooling import patched_part, pool, pool_parts, pooling_weights
from patch_retriever.backbones.readout import PoolingMode
from patch_retriever.concepts.query import words
from patch_retriever.errors import UserError, first_line
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.contributions import PooledItem, contributions, strengths
from patch_retriever.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Part:
    """What something adds to the similarity, without the patch and with it."""

    before: float
    after: float

    @property
    def size(self) -> float:
        """The larger of the two, whatever its sign."""
        return max(abs(self.before), abs(self.after))


@dataclass(frozen=True)
class ConceptPart(Part):
    """A concept's part, its activation in both pooled vectors, and how much of it the patch
    subtracts (0 to 1)."""

    concept: int
    query: float
    document: float
    strength: float


@dataclass(frozen=True)
class Explanation:
    """One similarity as a sum of parts: `concepts`, `geometry`, `residual` and `last_token` sum to
    `score`, before and after alike.

    `concepts` are those active on either side, the largest part first. The geometry is what all
    items of a group have in common (the SAE's bias, the shifts of the patch's maps; each item's
    level and size, where the SAE has a scale per token), the residual is what the SAE does not
    reconstruct. `last_token` is what the last token adds where a readout has it beside the mean:
    concepts are of the mean's half.
    """

    score: Part
    concepts: tuple[ConceptPart, ...]
    geometry: Part
    residual: Part
    last_token: Part | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def to_text(self, top: int = 10, labels: Mapping[int, str] | None = None) -> str:
        """For a terminal: the `top` largest concepts, all others as one, geometry, residual, sum.

        `labels` say what is known of a concept.
        """
        lines = [
            f"{'':<22}{'before':>9}{'after':>9}{'query':>9}{'document':>10}{'strength':>10}",
            *(
                f"{_row(f'concept {part.concept}', part)}{part.query:9.3f}{part.document:10.3f}"
                f"{part.strength:10.2f}  {(labels or {}).get(part.concept, '')}".rstrip()
                for part in self.concepts[:top]
            ),
        ]
        if rest := self.concepts[top:]:
            others = Part(sum(p.before for p in rest), sum(p.after for p in rest))
            lines.append(_row(f"{len(rest)} other concepts", others))
        lines += [_row("geometry", self.geometry), _row("residual", self.residual)]
        if self.last_token is not None:
            lines.append(_row("last token", self.last_token))
        return "\n".join([*lines, _row("similarity", self.score)])


def _row(name: str, part: Part) -> str:
    return f"{name:<22}{part.before:+9.4f}{part.after:+9.4f}"


def explain_pair(
    patch: Patch, sae: SparseAutoencoder, query: PooledItem, document: PooledItem
) -> Explanation:
    """The similarity of a query and a document, under no patch and under `patch`, in parts."""
    active_c = (query.codes_c != 0) | (document.codes_c != 0)
    numbers_m = active_c.nonzero()[:, 0]
    before, after = (
        contributions(used, sae, query, document, numbers_m) for used in (Patch(patch.site), patch)
    )
    columns = [
        values.tolist()
        for values in (
            before.concepts_m,
            after.concepts_m,
            numbers_m,
            query.codes_c[numbers_m],
            document.codes_c[numbers_m],
            strengths(patch, sae.n_concepts)[numbers_m],
        )
    ]
    concepts = [ConceptPart(*values) for values in zip(*columns, strict=True)]
    of_two = len(query.pooled_d) > sae.d_in
    return Explanation(
        Part(before.score, after.score),
        tuple(sorted(concepts, key=lambda part: -part.size)),
        Part(before.geometry, after.geometry),
        Part(before.residual, after.residual),
        Part(before.last_token, after.last_token) if of_two else None,
    )


def pool_item(
    tokens_td: Tensor, mask_t: Tensor, pooling: PoolingMode, sae: SparseAutoencoder
) -> PooledItem:
    """One item's unpatched tokens and their codes, pooled as the readout pools."""
    tokens_td, mask_1t = tokens_td.float(), mask_t[None]
    weights_1t = pooling_weights(mask_1t, patched_part(pooling))
    position_t = weights_1t[0].nonzero()[:, 0]
    codes = sae.codes(tokens_td[position_t])
    weights_t = weights_1t[0, position_t]
    values_e = codes.values_e * weights_t[codes.rows_e]
    scale_t = sae.scale(tokens_td[position_t])
    return PooledItem(
        pool_parts(tokens_td[None], mask_1t, pooling)[0],
        pool(tokens_td[None], pooling_weights(mask_1t, "mean"))[0],
        torch.zeros(sae.n_concepts).index_add_(0, codes.concepts_e, values_e),
        None if scale_t is None else scale_t @ weights_t,
    )


def concept_labels(folder: Path, tokens: int = 4) -> dict[int, str]:
    """What the table of a build says of its concepts: modality score and nearest tokens, as far as
    it has them; nothing without a table.

    Raises:
        UserError: the table is damaged.
    """
    import pyarrow.parquet as pq

    path = folder / "report" / "concepts.parquet"
    if not path.is_file():
        return {}
    try:
        has = pq.read_schema(path).names
        columns = [name for name in ("concept", "modality", "tokens") if name in has]
        rows = pq.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({first_line(error)}); run the same build again"
        ) from None
    labels = {}
    for row in rows:
        near = " ".join(words(row.get("tokens"))[:tokens])
        labels[row["concept"]] = f"modality {row['modality']:.2f}  {near}".rstrip()
    return labels


def check_sae(sae: SparseAutoencoder, patch: Patch, width: int, source: str) -> None:
    """Refuse an SAE that the patch was not made with: its codes would not be what is subtracted.

    Raises:
        UserError: its width is not the model's, or its concepts are not the patch's.
    """
    if sae.d_in != width:
        raise UserError(
            f"{source}: an SAE for activations of {sae.d_in} dimensions; this model's have {width}"
        )
    if patch.subtract is None:
        return
    numbers_m = patch.subtract.concepts_m
    known = sae.k is None and bool((numbers_m < sae.n_concepts).all())
    same = known and sae.input_scale == patch.subtract.input_scale
    same = same and all(
        torch.allclose(whole, held)
        for whole, held in (
            (sae.W_enc_dc[:, numbers_m], patch.subtract.W_enc_dm),
            (sae.b_enc_c[numbers_m], patch.subtract.b_enc_m),
            (sae.threshold_c[numbers_m], patch.subtract.threshold_m),
            (sae.W_dec_cd[numbers_m], patch.subtract.W_dec_md),
        )
    )
    if not same:
        raise UserError(
            f"{source}: not the SAE that this patch was made with (other concepts); "
            "name the one in run/sae of its build"
        )
