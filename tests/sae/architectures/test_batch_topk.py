"""BatchTopK and Matryoshka: k concepts per token on average; nested prefixes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.sae.architectures.batch_topk import BatchTopK, Matryoshka
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.ops import PreActivations

QUICK = settings(deadline=None, database=None, max_examples=200)


def select(architecture, u_nc, threshold=0.0):
    c = u_nc.shape[1]
    values = PreActivations(u_nc, torch.eye(c), torch.zeros(c))
    return architecture.select(values, torch.full((c,), threshold))


def pairs(entries):
    return list(zip(entries.rows_e.tolist(), entries.concepts_e.tolist(), strict=True))


@pytest.mark.parametrize("kind", [BatchTopK, Matryoshka])
def test_rich_tokens_have_more_concepts_than_plain_ones(kind):
    u_nc = torch.tensor([[0.1, 0.3, 0.2, -1.0], [2.0, 5.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]])
    assert set(pairs(select(kind(1), u_nc))) == {(1, 1), (1, 3), (1, 2)}
    assert len(pairs(select(kind(2), u_nc))) == 6
    assert len(pairs(select(kind(4), u_nc))) == 7  # all that are positive


@pytest.mark.parametrize("kind", [BatchTopK, Matryoshka])
def test_thresholds_play_no_part(kind):
    u_nc = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    assert pairs(select(kind(2), u_nc, 9.0)) == pairs(select(kind(2), u_nc))


def test_batch_topk_has_one_prefix_and_no_term_for_sparsity():
    assert BatchTopK(3).prefix_ends(10) == [10]
    nothing_e = torch.zeros(0)
    assert BatchTopK(3).sparsity_loss(nothing_e, nothing_e, nothing_e.bool(), 1) is None


def test_matryoshka_prefixes_in_concepts():
    assert Matryoshka(3).prefix_ends(64) == [4, 8, 16, 32, 64]
    assert Matryoshka(3, (0.25, 1.0)).prefix_ends(100) == [25, 100]
    assert Matryoshka(3).prefix_ends(3) == [1, 2, 3]
    assert Matryoshka(3).prefix_ends(1) == [1]


@QUICK
@given(
    st.lists(st.floats(1e-6, 1, exclude_max=True), unique=True, max_size=6),
    st.integers(1, 5000),
)
def test_matryoshka_prefixes_ascend_within_the_dictionary(shares, c):
    ends = Matryoshka(3, (*sorted(shares), 1.0)).prefix_ends(c)
    assert ends == sorted(set(ends))
    assert ends[0] >= 1
    assert ends[-1] == c
    for share in shares:
        assert any(abs(end - share * c) <= 1 for end in ends)


@pytest.mark.parametrize(
    "prefixes", [(), (0.5,), (1.0, 0.5), (0.5, 0.5, 1.0), (0.0, 1.0), (-0.5, 1.0), (0.5, 2.0)]
)
def test_invalid_prefixes(prefixes):
    with pytest.raises(ValueError, match="prefixes"):
        Matryoshka(3, prefixes)


def test_every_prefix_reconstructs_alone():
    """By hand: two tokens, four concepts, prefixes of two and four."""
    eye = torch.eye(4)
    weights = Weights(eye, torch.zeros(4), eye.clone(), torch.zeros(4), torch.zeros(4))
    learner = Learner(weights, Matryoshka(2, (0.5, 1.0)))
    x_nd = torch.tensor([[1.0, 2, 3, 0], [4, 0, 0, -5]])
    loss, gradient = learner.gradient(x_nd)
    # the first prefix leaves 3 of the first token, both leave -5 of the second
    assert float(loss.fvu) == pytest.approx(25 / 2)
    assert float(loss.total) == pytest.approx((25 / 2 + (9 + 25) / 2) / 2)
    # towards the bias: the mean over prefixes and tokens of -2 times what is left
    assert gradient.b_dec_d.tolist() == pytest.approx([0, 0, -1.5, 5])
