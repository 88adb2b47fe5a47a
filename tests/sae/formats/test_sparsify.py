"""sparsify's layout: settings of the peer that change its codes are refused."""

from __future__ import annotations

import pytest
import torch
from saved import assert_same_codes


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [
        ("transcode", True, "transcoder"),
        ("skip_connection", True, "skip"),
        ("signed", True, "negative"),
        ("activation", "groupmax", "groupmax"),
    ],
)
def test_saes_of_another_kind_are_refused(copied, setting, value, what):
    saved = copied("sparsify/topk")
    saved.change_config(**{setting: value})
    saved.assert_refused(saved.config, what)


def test_a_config_of_an_older_version_has_fewer_settings(copied):
    saved = copied("sparsify/topk")
    saved.change_config("activation", "multi_topk", "skip_connection", "transcode", signed=False)
    assert_same_codes(saved)


def test_an_sae_that_was_saved_without_its_decoder_is_refused(copied):
    saved = copied("sparsify/topk")
    saved.change_tensors(W_dec=None)
    saved.assert_refused(saved.weights, "W_dec")


def test_saved_in_half_precision_it_is_read_in_float32(copied):
    saved = copied("sparsify/topk")
    whole = saved.load().W_dec_cd
    saved.change_tensors(**{name: tensor.half() for name, tensor in saved.tensors().items()})
    half = saved.load().W_dec_cd
    assert half.dtype == torch.float32
    assert torch.equal(half, whole.half().float())
