"""A first look at a model: every site against its own forward pass, and sinks that are made up."""

from __future__ import annotations

import re

import pytest
import torch

from patch_retriever.activations.inspection import HANDFUL, handful, inspect
from patch_retriever.activations.sinks import FP16_LARGEST
from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.load import BUILT_IN, load_backbone, set_readout
from patch_retriever.backbones.readout import LAST, PAPER, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.data import all_items
from patch_retriever.items import Item

ITEMS = handful(all_items("scenes"))
SITES = ["layers.0", "layers.1", "layers.2", LAST]


@pytest.fixture(scope="module")
def looked(random_model):
    return inspect(load_backbone(str(random_model)), ITEMS, PAPER)


def test_it_looks_at_every_layer_and_the_last_hidden_state_in_order(looked):
    assert list(looked.sites) == SITES


def test_what_it_says_of_a_site_is_what_its_forward_pass_gives(looked, random_model):
    model = load_backbone(str(random_model))
    for site in SITES:
        set_readout(model, Readout(PAPER, site))
        found = []
        for item in ITEMS:
            with torch.no_grad():
                found.append(model(model.preprocess([item.load()]))["token_embeddings"][0])
        tokens_td = torch.cat(found)
        one = looked.sites[site]
        assert (one.items, one.tokens) == (len(ITEMS), len(tokens_td))
        norms_t = tokens_td.norm(dim=1)
        assert one.largest_norm == pytest.approx(float(norms_t.max()), rel=1e-4)
        assert one.median_norm == pytest.approx(float(norms_t.median()), rel=0.02)
        assert one.largest == pytest.approx(float(tokens_td.abs().max()), rel=1e-4)


def test_tokens_are_counted_by_role_and_by_item(looked):
    assert looked.items == {"text": HANDFUL, "image": HANDFUL, "both": HANDFUL}
    assert looked.image_tokens == (36, 36)
    assert looked.roles["image"] == 36 * 2 * HANDFUL
    assert set(looked.roles) == set(ROLES)
    assert all(looked.roles.values())
    assert sum(looked.roles.values()) == looked.sites[LAST].tokens


def test_the_built_in_model_has_no_sinks_anywhere():
    found = inspect(load_backbone(BUILT_IN), ITEMS, PAPER)
    assert {site: one.sinks for site, one in found.sites.items()} == dict.fromkeys(found.sites, 0)
    assert found.warnings == []


@pytest.mark.parametrize("batch_size", [1, 7])
def test_made_up_sinks_are_found_where_they_were_made(batch_size, random_model):
    """At the first token, at the first image token and at the turn's end, after one layer only."""
    model = load_backbone(str(random_model))
    mlp = model.model.get_submodule(f"{layers_path(model.model)}.1.mlp")
    roles_of, places = None, []

    def remember(_module, args, kwargs):
        features = args[0] if args else kwargs["features"]
        roles_nt, mask_nt = roles_of(features), features["attention_mask"].bool()
        image_nt = roles_nt == ROLES.index("image")
        first_nt = mask_nt & (mask_nt.cumsum(1) == 1)
        last_nt = mask_nt.flip(1) & (mask_nt.flip(1).cumsum(1) == 1)
        places[:] = [first_nt | (image_nt & (image_nt.cumsum(1) == 1)) | last_nt.flip(1)]

    def make_sinks(_module, _args, output_ntd):
        output_ntd[..., 5][places[0]] = 20_000
        return output_ntd

    set_readout(model, Readout(PAPER))
    roles_of = TokenRoles(model)
    model.register_forward_pre_hook(remember, with_kwargs=True)
    mlp.register_forward_hook(make_sinks)
    found = inspect(model, ITEMS, PAPER, batch_size)
    one = found.sites["layers.1"]
    assert found.sites["layers.0"].sinks == 0
    with_images = 2 * HANDFUL
    assert one.sinks == 2 * len(ITEMS) + with_images
    assert (one.first, one.by_role["image"]) == (len(ITEMS), with_images)
    assert one.massive == ((5, 1.0),)
    assert one.largest == pytest.approx(20_000, abs=1)
    (warning,) = found.warnings  # the stream carries them on
    assert re.match(r"layers\.[12] and 1 more sites: activations reach 20,000,", warning)
    assert f"float16 ends at {FP16_LARGEST:,.0f}" in warning


def test_an_overflow_has_a_line_of_its_own(looked):
    from dataclasses import replace

    large = replace(looked.sites[LAST], largest=20_000.0)
    larger = replace(large, largest=30_000.0)
    broken = replace(looked.sites[LAST], not_finite=3)
    sites = {"layers.0": large, "layers.1": larger, "layers.2": broken, LAST: looked.sites[LAST]}
    first, second = replace(looked, sites=sites).warnings
    assert first.startswith("layers.2: 3 tokens have activations that are not finite")
    assert second.startswith("layers.1 and 1 more sites: activations reach 30,000")


# which items


def test_a_handful_is_from_all_over():
    items = [Item(f"text {n}") for n in range(1000)]
    chosen = [int(item.text.split()[1]) for item in handful(items)]
    assert len(chosen) == HANDFUL
    assert chosen == sorted(chosen)
    assert chosen[-1] - chosen[0] > 800


def test_pairs_are_joined_where_no_item_is_both(photo_folder):
    chosen = handful(all_items(str(photo_folder / "pairs.jsonl")))
    kinds = [item.kind for item in chosen]
    assert kinds == ["text"] * HANDFUL + ["image"] * HANDFUL + ["both"] * HANDFUL


def test_few_items_are_all_taken_once():
    assert [item.text for item in handful([Item("one"), Item("two")])] == ["one", "two"]
