"""The plan of a build, from its settings and the model's config: no weights are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from patch_retriever.backbones.load import BUILT_IN, built_in_model
from patch_retriever.backbones.pooling import parts_of
from patch_retriever.backbones.size import backbone_size
from patch_retriever.config import BuildConfig
from patch_retriever.data import SCENES, scenes_data
from patch_retriever.items import KINDS
from patch_retriever.plan.sizes import Sizes, Split
from patch_retriever.plan.speed import measured_speed
from patch_retriever.plan.stages import store_tokens
from patch_retriever.plan.table import plan_json
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.pairs import SHARES
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.settings import training_steps


def plan_of(config: BuildConfig, n_pairs: int, sae: SparseAutoencoder | None) -> dict[str, Any]:
    """The plan of a build of `n_pairs` pairs (of the scenes, if those are what it is built from),
    with an SAE of its own or a given one.

    Raises:
        UserError: the model's config cannot be read.
    """
    import torch

    name = str(built_in_model()) if config.model == BUILT_IN else config.model
    size = backbone_size(name, config.revision)
    dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    sizes = Sizes(
        *_splits(config, n_pairs),
        width=size.width,
        concepts=config.sae.expansion * size.width if sae is None else sae.n_concepts,
        active=config.sae.k,
        image_tokens=size.image_tokens,
        parameters=size.parameters,
        decoder_parameters=size.decoder_parameters,
        parameter_bytes=dtype.itemsize,
        sae_steps=0 if sae is not None else config.sae.steps or 0,
        sae_batch=config.sae.batch_size,
        most=config.max_calibration_items,
        parts=1 if config.preset == "paper" else len(parts_of(config.pooling or "mean+lasttoken")),
        pooled_tokens=config.pooling != "lasttoken",
    )
    if sae is None and config.sae.steps is None:
        steps = training_steps(store_tokens(sizes), config.sae.batch_size)
        sizes = replace(sizes, sae_steps=steps)
    found = plan_json(sizes, measured_speed(config.device, dtype))
    return {**found, "image_tokens_from": size.image_tokens_from}


def _splits(config: BuildConfig, n_pairs: int) -> tuple[Split, Split, Split]:
    if config.pairs == SCENES:
        found = scenes_data(config.scenes.model_dump(), config.seed).splits
        calibration, validation, test = (_split(found[name]) for name in SHARES)
    else:
        calibration, validation, test = (
            Split.of_pairs(round(share * n_pairs)) for share in SHARES.values()
        )
    return calibration, validation, test


def _split(collection: Collection) -> Split:
    kinds = [item.kind for item in collection.items]
    texts, images, both = (kinds.count(kind) for kind in KINDS)
    comparisons = sum(len(task.queries) * len(task.documents) for task in collection.tasks)
    return Split(texts, images, both, comparisons)
