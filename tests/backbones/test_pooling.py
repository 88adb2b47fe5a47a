"""Pooling weights: a mean or a last token, whichever side the padding is on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.backbones.pooling import pool, pooling_weights

QUICK = settings(deadline=None, database=None, max_examples=60)
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("mask_nt", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
def test_the_mean_weighs_every_token_of_an_item_alike(mask_nt):
    expected_nt = mask_nt * torch.tensor([[1 / 3], [1 / 4], [1.0]])
    assert torch.allclose(pooling_weights(mask_nt, "mean"), expected_nt)


def test_the_last_token_with_padding_on_the_right():
    assert pooling_weights(RIGHT, "lasttoken").argmax(1).tolist() == [2, 3, 0]


def test_the_last_token_with_padding_on_the_left():
    assert pooling_weights(RIGHT.flip(1), "lasttoken").argmax(1).tolist() == [3, 3, 3]


@st.composite
def padded(draw):
    """(tokens, mask, lengths): items padded on either side, with garbage there."""
    width = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    mask_nt = torch.zeros(len(lengths), width, dtype=torch.long)
    for row_t, length in zip(mask_nt, lengths, strict=True):
        row_t[slice(width - length, None) if draw(st.booleans()) else slice(length)] = 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return torch.randn(len(lengths), width, 3, generator=generator), mask_nt


@QUICK
@given(padded())
def test_pooled_vectors_see_no_padding(batch):
    tokens_ntd, mask_nt = batch
    for pooling, expected in (("mean", lambda t: t.mean(0)), ("lasttoken", lambda t: t[-1])):
        pooled_nd = pool(tokens_ntd, pooling_weights(mask_nt, pooling))
        for found_d, token_td, mask_t in zip(pooled_nd, tokens_ntd, mask_nt, strict=True):
            assert torch.allclose(found_d, expected(token_td[mask_t.bool()]), atol=1e-6)
