"""overcomplete's files: k comes from the user, and other classes' files are refused."""

from __future__ import annotations

import pytest
import torch


def test_without_k_it_is_refused(copied):
    saved = copied("overcomplete/model_state")
    saved.k = None
    saved.assert_refused(saved.weights, "active per token", "k=50")


@pytest.mark.parametrize("k", [0, -1, 17, 2.5, True])
def test_a_k_that_is_none_is_refused(copied, k):
    saved = copied("overcomplete/state")
    saved.k = k
    saved.assert_refused(saved.weights, "k is", str(k))


def test_k_decides_how_many_are_active(copied):
    saved = copied("overcomplete/state")
    x_nd, _, _ = saved.codes()
    for k in (1, 5):
        saved.k = k
        assert int((saved.load().encode(x_nd) != 0).sum(1).max()) == k


def test_rows_are_units_times_the_multiplier(copied):
    saved = copied("overcomplete/state")
    lengths_c = saved.load().W_dec_cd.norm(dim=1)
    length = saved.tensors()["dictionary.multiplier"].exp()
    torch.testing.assert_close(lengths_c, length.expand(16))
    assert not bool(saved.load().b_dec_d.any())


@pytest.mark.parametrize(
    "name",
    [
        "thresholds",  # JumpSAE
        "encoder.mlp_blocks.0.0.weight",  # a deeper encoder
        "encoder.final_block.1.weight",  # a norm after the encoder
    ],
)
def test_files_of_its_other_saes_are_refused(copied, name):
    saved = copied("overcomplete/state")
    saved.change_tensors(**{name: torch.ones(16)})
    saved.assert_refused(saved.weights, name)


@pytest.mark.parametrize("held", [{}, [], {"model_state": 3}, torch.ones(3), {1: torch.ones(3)}])
def test_a_file_of_something_else_is_refused(copied, held):
    saved = copied("overcomplete/state")
    torch.save(held, saved.weights)
    saved.assert_refused(saved.weights, "dictionary._weights")
