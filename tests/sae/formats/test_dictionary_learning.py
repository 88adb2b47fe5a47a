"""dictionary_learning's layout: classes that are refused, and which gate a TopK SAE has."""

from __future__ import annotations

import pytest
import torch
from saved import FIXTURES, Saved


@pytest.mark.parametrize(
    "name", ["GatedAutoEncoder", "AutoEncoderNew", "CrossCoder", None, ["AutoEncoder"]]
)
def test_other_classes_are_refused(copied, name):
    saved = copied("dictionary_learning/standard")
    saved.change_config(trainer={"dict_class": name})
    saved.assert_refused(saved.config, repr(name), "BatchTopKSAE")


@pytest.mark.parametrize("trainer", [None, [], "AutoEncoder", {}])
def test_a_config_without_a_class_is_refused(copied, trainer):
    saved = copied("dictionary_learning/standard")
    saved.change_config(trainer=trainer)
    saved.assert_refused(saved.config, "None")


def test_topk_ignores_its_threshold_as_the_package_does():
    saved = Saved(FIXTURES / "dictionary_learning/topk")
    x_nd, codes_nc, _ = saved.codes()
    assert float(codes_nc[codes_nc > 0].min()) < saved.tensors()["threshold"]
    assert torch.equal(saved.load().encode(x_nd) != 0, codes_nc != 0)


@pytest.mark.parametrize("k", [0, 17])
def test_a_k_out_of_range_is_refused(copied, k):
    saved = copied("dictionary_learning/topk")
    saved.change_tensors(k=torch.tensor(k))
    saved.assert_refused(saved.weights, "k is", str(k))


def test_a_list_in_place_of_the_weights_is_refused(copied):
    saved = copied("dictionary_learning/topk")
    torch.save([torch.ones(3)], saved.weights)
    saved.assert_refused(saved.weights, "state dict")


def test_its_weights_without_its_config_are_refused_with_a_hint(copied):
    saved = copied("dictionary_learning/topk")
    saved.source, saved.k = saved.weights, 3
    saved.assert_refused(saved.weights, "config.json")
