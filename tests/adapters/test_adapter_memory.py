"""Settings for so much memory: estimates that move as they should, and suggestions that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patch_retriever.adapters.memory import SPARE, Shape, estimate_gib, suggest
from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.adapters.targets import adapter_config
from patch_retriever.backbones.load import load_backbone

TWO_BILLION = Shape(2_200_000_000, 28, 1536, 8960, 2, 28 * (4 * 1536 + 3 * (1536 + 8960)))
HUGE = replace(TWO_BILLION, parameters=72_000_000_000)
SETTINGS = AdapterSettings()


def test_a_shape_is_read_from_a_model(random_model):
    from peft import get_peft_model

    transformer = load_backbone(str(random_model))
    shape = Shape.of(transformer, SETTINGS)
    assert (shape.layers, shape.width, shape.mlp_width, shape.bytes_each) == (3, 32, 64, 4)
    assert shape.parameters == sum(p.numel() for p in transformer.model.parameters())
    adapted = get_peft_model(transformer.model, adapter_config(transformer.model, SETTINGS))
    n = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert n == SETTINGS.rank * shape.per_rank


def test_estimates_fall_with_the_chunk_the_rank_and_checkpointing():
    whole = estimate_gib(TWO_BILLION, SETTINGS, 400)
    assert whole > estimate_gib(TWO_BILLION, replace(SETTINGS, chunk_size=32), 400)
    assert whole > estimate_gib(TWO_BILLION, replace(SETTINGS, gradient_checkpointing=True), 400)
    assert whole > estimate_gib(TWO_BILLION, replace(SETTINGS, rank=4), 400)
    assert whole > TWO_BILLION.parameters * 2 / 2**30


def test_suggestions_fit_and_grow_with_the_memory():
    found = suggest(TWO_BILLION, SETTINGS, 400)
    assert [one.memory_gib for one in found] == [8, 24, 80]
    assert all(one.settings and one.estimate_gib <= SPARE * one.memory_gib for one in found)
    assert [one.settings.gradient_checkpointing for one in found] == [True, True, False]
    assert found[0].settings.chunk_size < found[1].settings.chunk_size
    # the loss is the same whatever is suggested
    for one in found:
        same = replace(one.settings, chunk_size=64, gradient_checkpointing=False)
        assert same == SETTINGS


def test_what_does_not_fit_is_said():
    found = suggest(HUGE, SETTINGS, 400)
    assert [one.to_json()["fits"] for one in found] == [False, False, False]
    assert found[0].to_json()["chunk_size"] is None
    assert found[0].estimate_gib == pytest.approx(134, rel=0.05)
