"""The probe against plain forward hooks on a model that nnsight never touched."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from PIL import Image
from sentence_transformers.sentence_transformer.modules import Pooling

from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.items import Item
from patch_retriever.probe import Probe

LAYERS = ("layers.0", "layers.1", "layers.2")
SITES = (*LAYERS, LAST, "pooled")
WIDTH = 32


class Red:
    """A red picture."""

    name = "red"

    def open(self):
        return Image.new("RGB", (72, 72), (200, 30, 30))


ITEMS = (Item("a cat on a mat"), Item(picture=Red()), Item("a cat", Red()))
READOUT = Readout(ONE_WORD, pooling="lasttoken")


@pytest.fixture(scope="module")
def plain(random_model):
    """A model that is never wrapped, and its pooling."""
    transformer = load_backbone(str(random_model))
    set_readout(transformer, READOUT)
    return transformer, Pooling(WIDTH, "lasttoken")


@pytest.fixture(scope="module")
def probe(random_model):
    transformer = load_backbone(str(random_model))
    set_readout(transformer, READOUT)
    return Probe(transformer, Pooling(WIDTH, "lasttoken"))


@pytest.fixture
def features(plain):
    return plain[0].preprocess([item.load() for item in ITEMS])


def tensor_of(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(transformer, hooks):
    """`hooks[site]` on the decoder layers while the block runs."""
    layers = transformer.model.language_model.layers
    handles = [
        layers[int(site.removeprefix("layers."))].register_forward_hook(hook)
        for site, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_read(plain, features):
    """The activations at every site, by hooks and by running the parts one after the other."""
    transformer, pooling = plain
    found = {}

    def keep(site):
        def hook(_module, _inputs, output):
            found[site] = tensor_of(output).clone()

        return hook

    with torch.no_grad(), hooked(transformer, {site: keep(site) for site in LAYERS}):
        out = transformer(dict(features))
        found[LAST] = out["token_embeddings"].clone()
        found["pooled"] = pooling(out)["sentence_embedding"]
    return found


def plain_run(plain, features, edits):
    """The pooled vectors with an edit at each of some sites."""
    transformer, pooling = plain

    def editing(site):
        def hook(_module, _inputs, output):
            edited = edits[site](tensor_of(output))
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    in_layers = {site: editing(site) for site in edits if site in LAYERS}
    with torch.no_grad(), hooked(transformer, in_layers):
        out = transformer(dict(features))
        if LAST in edits:
            out["token_embeddings"] = edits[LAST](out["token_embeddings"])
        pooled_nd = pooling(out)["sentence_embedding"]
        return edits["pooled"](pooled_nd) if "pooled" in edits else pooled_nd


def test_everything_is_read_as_plain_hooks_read_it(probe, plain, features):
    found, expected = probe.read(features, SITES), plain_read(plain, features)
    assert set(found) == set(SITES)
    for site in SITES:
        assert torch.equal(found[site], expected[site]), site


@pytest.mark.parametrize("site", SITES)
def test_a_site_is_read_alone(site, probe, plain, features):
    found = probe.read(features, [site])
    assert set(found) == {site}
    assert torch.equal(found[site], plain_read(plain, features)[site])


def test_sites_may_be_named_in_any_order(probe, features):
    forward, backward = (probe.read(features, sites) for sites in (SITES, SITES[::-1]))
    assert all(torch.equal(forward[site], backward[site]) for site in SITES)


def test_sites_differ(probe, features):
    found = probe.read(features, SITES)
    for first, second in pairwise(SITES[:4]):
        assert not torch.allclose(found[first], found[second], atol=1e-3)


def test_reading_leaves_the_batch_as_it_was(probe, features):
    before = {key: value.clone() for key, value in features.items() if hasattr(value, "clone")}
    probe.read(features, SITES)
    assert "token_embeddings" not in features
    assert all(torch.equal(features[key], value) for key, value in before.items())


def test_reading_twice_gives_the_same(probe, features):
    first, second = (probe.read(features, ["layers.1"])["layers.1"] for _ in range(2))
    assert torch.equal(first, second)


DIRECTION_D = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))


def push(h):
    """Move every vector along one direction."""
    return h + 0.5 * DIRECTION_D


def halve(h):
    return h * 0.5


def remove(h):
    """Take one direction out."""
    unit_d = DIRECTION_D / DIRECTION_D.norm()
    return h - (h @ unit_d)[..., None] * unit_d


@pytest.mark.parametrize("site", SITES)
def test_an_edit_equals_a_plain_hook_that_edits(site, probe, plain, features):
    found = probe.read(features, ["pooled"], {site: push})["pooled"]
    assert torch.equal(found, plain_run(plain, features, {site: push}))
    assert not torch.allclose(found, plain_run(plain, features, {}), atol=1e-3)


@pytest.mark.parametrize(
    "edits",
    [
        {"layers.0": push, "layers.2": remove},
        {LAST: remove, "pooled": push},
        {"pooled": halve, LAST: push, "layers.1": remove, "layers.0": halve},
    ],
    ids=lambda edits: " and ".join(edits),
)
def test_edits_at_several_sites(edits, probe, plain, features):
    found = probe.read(features, ["pooled"], edits)["pooled"]
    assert torch.equal(found, plain_run(plain, features, edits))


def test_a_run_without_edits_is_the_plain_model(probe, plain, features):
    found = probe.read(features, ["pooled"], {})["pooled"]
    assert torch.equal(found, plain_read(plain, features)["pooled"])


def test_an_edit_does_not_outlive_its_run(probe, plain, features):
    probe.read(features, ["pooled"], {"layers.0": push, LAST: remove})
    found = probe.read(features, SITES)
    expected = plain_read(plain, features)
    assert all(torch.equal(found[site], expected[site]) for site in SITES)


def test_an_edit_sees_the_activations_before_it(probe, plain, features):
    seen = {}

    def look(h_ntd):
        seen["layers.1"] = h_ntd.clone()
        return h_ntd

    probe.read(features, ["pooled"], {"layers.1": look})
    assert torch.equal(seen["layers.1"], plain_read(plain, features)["layers.1"])


def test_an_error_in_an_edit_comes_out_and_leaves_the_model_clean(probe, plain, features):
    def fail(_h):
        raise KeyError("a mistake of the edit")

    with pytest.raises(KeyError, match="a mistake of the edit"):
        probe.read(features, ["pooled"], {"layers.1": fail})
    found = probe.read(features, ["pooled"])["pooled"]
    assert torch.equal(found, plain_read(plain, features)["pooled"])


def test_without_a_pooling_the_probe_ends_at_the_tokens(random_model, plain, features):
    transformer = load_backbone(str(random_model))
    set_readout(transformer, READOUT)
    found = Probe(transformer).read(features, [LAST], {LAST: halve})
    assert torch.equal(found[LAST], plain_read(plain, features)[LAST] * 0.5)
    assert set(found) == {LAST}


def test_last_hidden_state_is_what_the_readout_gives_to_the_pooling(random_model, plain, features):
    transformer = load_backbone(str(random_model))
    set_readout(transformer, Readout(ONE_WORD, "layers.1", "lasttoken"))
    found = Probe(transformer).read(features, [LAST, "layers.1"])
    assert torch.equal(found[LAST], found["layers.1"])
    assert torch.equal(found[LAST], plain_read(plain, features)["layers.1"])
