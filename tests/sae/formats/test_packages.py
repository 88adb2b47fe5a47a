"""SAEs that other packages saved give the codes that the packages themselves give."""

from __future__ import annotations

import pytest
import torch
from saved import FIXTURES, K, Saved, assert_same_codes

from patch_retriever.sae.formats import load_sae, save_sae

CASES = {
    "dictionary_learning/batch_topk": None,
    "dictionary_learning/batch_topk_without_threshold": None,
    "dictionary_learning/jumprelu": None,
    "dictionary_learning/matryoshka": None,
    "dictionary_learning/standard": None,
    "dictionary_learning/topk": K,
    "ours/jumprelu": None,
    "ours/token": None,
    "ours/topk": K,
    "overcomplete/model_state": K,
    "overcomplete/state": K,
    "saelens/batchtopk": None,
    "saelens/jumprelu": None,
    "saelens/jumprelu_layer_norm": None,
    "saelens/matryoshka": None,
    "saelens/standard": None,
    "saelens/standard_bfloat16": None,
    "saelens/standard_layer_norm": None,
    "saelens/standard_raw": None,
    "saelens/topk": K,
    "saelens/topk_layer_norm": K,
    "saelens/topk_rescaled": K,
    "sparsify/multi_topk": K,
    "sparsify/topk": K,
}
"""Every saved SAE, with the k of its gate."""


def test_every_saved_sae_is_tested():
    assert [str(p.relative_to(FIXTURES)) for p in sorted(FIXTURES.glob("*/*"))] == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_package(case):
    assert_same_codes(Saved(FIXTURES / case))


@pytest.mark.parametrize(("case", "k"), CASES.items())
def test_a_topk_gate_stays_one_and_thresholds_become_ours(case, k):
    sae = Saved(FIXTURES / case).load()
    assert sae.k == k
    assert sae.input_scale == ("token" if case.endswith(("layer_norm", "/token")) else "none")
    assert (sae.d_in, sae.n_concepts) == (8, 16)
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    assert bool((sae.threshold_c >= 0).all())


@pytest.mark.parametrize("case", CASES)
def test_saved_as_ours_and_loaded_again_it_is_the_same(case, tmp_path):
    sae = Saved(FIXTURES / case).load()
    save_sae(sae, tmp_path)
    again = load_sae(tmp_path)
    assert (again.k, again.input_scale) == (sae.k, sae.input_scale)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_fixtures_hold_what_makes_loading_hard():
    jumprelu = [
        Saved(FIXTURES / f"{p}/jumprelu").tensors() for p in ("saelens", "dictionary_learning")
    ]
    assert all(bool((tensors["threshold"] < 0).any()) for tensors in jumprelu)
    unset = Saved(FIXTURES / "dictionary_learning/batch_topk_without_threshold")
    assert unset.tensors()["threshold"] == -1
    for case in CASES:
        sae = Saved(FIXTURES / case).load()
        assert bool(sae.b_dec_d.any()) or case.startswith("overcomplete"), case
        assert bool(sae.b_enc_c.any()), case
    for case in ("saelens/topk_rescaled", "dictionary_learning/standard"):
        tensors = Saved(FIXTURES / case).tensors()
        rows_cd = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T
        assert float(rows_cd.norm(dim=1).std()) > 0.1, case
    assert Saved(FIXTURES / "overcomplete/state").tensors()["dictionary.multiplier"].abs() > 0.1
