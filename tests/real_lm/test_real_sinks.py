"""Sinks of a real language model: found where they are, left out of training and of means."""

from __future__ import annotations

import pytest
import torch

from patch_retriever.activations.collect import collect_pooled, collect_tokens
from patch_retriever.activations.inspection import handful, inspect
from patch_retriever.activations.store import Store, StoreSource, sinks_text
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.data import all_items

ITEMS = handful(all_items("scenes"))
READOUT = Readout(ONE_WORD, "layers.14", "mean")


@pytest.fixture(scope="module")
def transformer(real_llava):
    return load_backbone(str(real_llava))


@pytest.fixture(scope="module")
def looked(transformer):
    return inspect(transformer, ITEMS, ONE_WORD)


def test_in_the_deep_layers_the_first_token_alone_is_one_with_one_massive_dimension(looked):
    for n in range(11, 28):
        one = looked.sites[f"layers.{n}"]
        assert (one.sinks, one.first) == (len(ITEMS), len(ITEMS)), n
        assert one.by_role["special"] == len(ITEMS)
        ((_, share),) = one.massive
        assert share > 0.9
        assert one.median_ratio > 30
    assert len({looked.sites[f"layers.{n}"].massive[0][0] for n in range(11, 28)}) == 1


def test_the_final_norm_leaves_none(looked):
    assert looked.sites[LAST].sinks == 0


def test_float16_is_warned_of(looked):
    (warning,) = looked.warnings
    assert "activations reach 2" in warning


@pytest.fixture(scope="module", params=[None, 24 * len(ITEMS)])
def store(request, transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    collect_tokens(transformer, ITEMS, READOUT, folder, tokens_wanted=request.param)
    return Store(folder)


def test_no_token_that_is_trained_on_is_far_larger_than_the_others(store):
    source = StoreSource(store)
    blocks = [source.read(block) for block in source.epoch(torch.Generator().manual_seed(0))]
    parts = [block.activations_td.float().norm(dim=1) for block in blocks]
    norms_t = torch.cat([*parts, store.held_out(10_000)[0].norm(dim=1)])
    assert norms_t.max() < 10 * norms_t.median()
    assert store.sinks.sinks == len(ITEMS)
    assert sinks_text(store).startswith(f"{len(ITEMS)} of ")


def test_means_are_those_without_the_sink(store, transformer):
    with_sink_nd = collect_pooled(transformer, ITEMS, [READOUT])[READOUT]
    without_nd = store.pooled_vectors()
    assert (without_nd.norm(dim=1) < 0.7 * with_sink_nd.norm(dim=1)).all()
    cosines_nn = (
        torch.nn.functional.normalize(without_nd) @ torch.nn.functional.normalize(with_sink_nd).T
    )
    assert cosines_nn.diagonal().max() < 0.9  # of texts the sink is nearly all of the mean


def test_a_sampled_store_gives_the_same_means(transformer, tmp_path):
    found = []
    for name, wanted in (("all", None), ("some", 24 * len(ITEMS))):
        collect_tokens(transformer, ITEMS, READOUT, tmp_path / name, tokens_wanted=wanted)
        found.append(Store(tmp_path / name))
    assert found[1].n_tokens < found[0].n_tokens
    assert torch.equal(found[0].pooled_vectors(), found[1].pooled_vectors())
