"""Defaults: what is left open is decided by the site and the number of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patch_retriever.sae.settings import SAESettings, learning_rate, training_steps


@pytest.mark.parametrize(
    ("asked", "site", "scale"),
    [
        ("auto", "layers.0", "token"),
        ("auto", "layers.27", "token"),
        ("auto", "last_hidden_state", "site"),
        ("auto", None, "site"),
        ("token", "last_hidden_state", "token"),
        ("site", "layers.3", "site"),
    ],
)
def test_the_input_scale_follows_from_the_site(asked, site, scale):
    resolved = SAESettings(input_scale=asked).resolved(site, 192, 7)
    assert (resolved.input_scale, resolved.steps) == (scale, 7)
    assert resolved.scale_of_input == ("token" if scale == "token" else "none")


def test_the_learning_rate_falls_with_the_root_of_the_number_of_concepts():
    assert learning_rate(1) == learning_rate(1536) == 2e-3  # the built-in demo's
    assert learning_rate(4 * 1536) == pytest.approx(1e-3)
    assert learning_rate(16 * 576) == pytest.approx(8.165e-4, rel=1e-3)
    assert SAESettings(expansion=16).resolved(None, 576, 1).lr == learning_rate(9216)
    assert SAESettings(expansion=16, lr=0.5).resolved(None, 576, 1).lr == 0.5


def test_steps_by_hand():
    assert training_steps(150_000, 1024) == 600  # the built-in demo
    assert training_steps(150_000, 2048) == 300
    assert training_steps(None, 1024) == training_steps(1, 1024) == 600
    assert training_steps(500_000, 1000) == 1500
    assert training_steps(50_000_000, 1024) == 2000
    assert training_steps(50_000_000, 3_000_000) == 1


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**5))
def test_more_tokens_are_never_fewer_steps(few, many, batch_size):
    few, many = sorted((few, many))
    assert training_steps(few, batch_size) <= training_steps(many, batch_size)
    assert (training_steps(few, batch_size) - 1) * batch_size < 2_048_000
    assert training_steps(few, batch_size) * batch_size >= 614_400
