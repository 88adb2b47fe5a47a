"""The stage of a build that scores concepts: from calibration features to the concept table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from patch_retriever.backbones.readout import Readout
from patch_retriever.backbones.unembedding import nearest_tokens
from patch_retriever.concepts.query import ABOUT, TABLE
from patch_retriever.concepts.scores import CodesOf, codes_of, score_concepts, unexplained
from patch_retriever.concepts.table import TOP, ConceptTable, examples
from patch_retriever.data import Data
from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.files import write_json
from patch_retriever.items import KINDS
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.negatives import hard_negatives
from patch_retriever.sae.formats import load_sae
from patch_retriever.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

CROSSING = ("t->i", "i->t")
"""Directions whose pairs are a text and an image: attribution and bridge are defined on these."""


def score(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    features: Path,
    sae_folder: Path,
    codes_from: CodesOf,
    folder: Path,
) -> None:
    """Score every concept on calibration.

    Writes `concepts.parquet` (scores, top items, nearest tokens) and `concepts.json`: what was
    scored, and how much of the pooled vectors' variance either kind of codes leaves unexplained.

    Raises:
        UserError: no document is wrong for any query, so there are no hard negatives.
    """
    calibration = Features.load(features / "calibration.safetensors")
    collection, sae = data.splits["calibration"], load_sae(sae_folder)
    table, about = scored(calibration, collection, sae, codes_from, data.about)
    codes, kinds_n = codes_of(calibration, sae, codes_from), calibration.kinds_n.long()
    tokens, unembedding = nearest_tokens(transformer, sae.W_dec_cd, readout.site, TOP)
    table.save(folder / TABLE, examples(codes, kinds_n, tokens, unembedding))
    write_json(folder / ABOUT, about)


def scored(
    calibration: Features,
    collection: Collection,
    sae: SparseAutoencoder,
    codes_from: CodesOf,
    source: str,
) -> tuple[ConceptTable, dict[str, Any]]:
    """The scores of every concept on a collection's features, and what was scored; `source` says
    what data it is.

    Raises:
        UserError: no document is wrong for any query, so there are no hard negatives.
    """
    raw_nd, kinds_n = calibration.pooled_nd, calibration.kinds_n.long()
    means_kd = torch.stack([raw_nd[kinds_n == kind].mean(0) for kind in range(len(KINDS))])
    crossing = [task for task in collection.tasks if task.direction in CROSSING]
    negatives_n2 = hard_negatives(raw_nd, crossing)
    if not len(negatives_n2):
        raise UserError(
            f"{source} In calibration no document is wrong for any query, so there are no hard "
            "negatives to score concepts by; give pairs whose texts tell pictures apart"
        )
    pairs_n2 = torch.from_numpy(collection.pairs(CROSSING))
    negatives_centred_n2 = hard_negatives(raw_nd - means_kd[kinds_n], crossing)
    found = {which: codes_of(calibration, sae, which) for which in get_args(CodesOf)}
    table = score_concepts(
        replace(calibration, codes=found[codes_from]),
        sae.W_dec_cd,
        pairs_n2,
        negatives_n2,
        negatives_centred_n2,
    )
    about = {
        "codes": codes_from,
        "items": dict(zip(KINDS, torch.bincount(kinds_n, minlength=3).tolist(), strict=True)),
        "pairs": len(pairs_n2),
        "hard_negatives": len(negatives_n2),
        "unexplained": {w: unexplained(calibration, codes, sae) for w, codes in found.items()},
    }
    return table, about
