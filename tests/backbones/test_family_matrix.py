"""Every model family, from its own classes and processor to embeddings, roles and sites."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
import torch

from families import FAMILIES, NEEDS, missing, parameter
from patch_retriever.backbones.families import (
    decoder_path,
    image_token_id,
    placeholders,
    residual_norm,
)
from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import (
    LAST,
    ONE_WORD,
    PAPER_READOUT,
    PLAIN,
    Readout,
)
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.probe import Probe
from pictured import SQUARE, TALL, WIDE

READOUTS = (PAPER_READOUT, Readout(ONE_WORD, pooling="lasttoken"))
LAYERS = ("layers.0", "layers.1", "layers.2")
by_readout = pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.prompt.name)


ITEMS = {
    "text": [Item("a cat"), Item("two small dogs on a mat, asleep")],
    "image": [Item(picture=SQUARE), Item(picture=TALL), Item(picture=WIDE)],
    "both": [Item("a cat", TALL), Item("two small dogs on a mat, asleep", SQUARE)],
}
KINDS = {**ITEMS, "mixed": [item for items in ITEMS.values() for item in items]}
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", params=map(parameter, FAMILIES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def transformer(stand_in, name):
    return load_backbone(str(stand_in(name)))


@pytest.fixture(scope="module")
def probed(stand_in, name):
    """A second copy, which nnsight wraps, and its probe."""
    transformer = load_backbone(str(stand_in(name)))
    return transformer, Probe(transformer)


def preprocessed(transformer, items):
    return transformer.preprocess([item.load() for item in items])


@by_readout
@by_kind
def test_embeddings_are_finite_and_of_one_item_alone(transformer, readout, kind):
    model = with_readout(transformer, readout)
    chats = [item.load() for item in KINDS[kind]]
    found_nd = model.encode(chats)
    assert found_nd.shape == (len(chats), 32)
    assert np.isfinite(found_nd).all()
    assert np.array_equal(found_nd, model.encode(chats))
    for found_d, chat in zip(found_nd, chats, strict=True):
        assert np.abs(model.encode([chat])[0] - found_d).max() < 1e-5
    for a_d, b_d in combinations(found_nd, 2):
        assert np.abs(a_d - b_d).max() > 1e-4, "two items with one embedding"


def test_a_texts_own_placeholders_are_text(transformer):
    """With a picture beside it and without, no token more stands for a picture."""
    set_readout(transformer, PAPER_READOUT)
    tokens = placeholders(transformer.config, transformer.tokenizer, transformer.processor)
    assert tokens
    image = image_token_id(transformer.config)
    for pictures in ([], [SQUARE]):
        counts = []
        for text in ("what is it", f"what {' '.join(tokens)} is{tokens[0]}it"):
            features = transformer.preprocess([Item.of(text, pictures).load()])
            with torch.no_grad():
                assert transformer(dict(features))["token_embeddings"].isfinite().all()
            counts.append(int((features["input_ids"] == image).sum()))
        assert counts[0] == counts[1]


def test_the_order_of_a_batch_does_not_matter(transformer):
    model = with_readout(transformer, PAPER_READOUT)
    chats = [item.load() for item in KINDS["mixed"]]
    backward_nd = model.encode(chats[::-1])[::-1]
    assert np.abs(model.encode(chats) - backward_nd).max() < 1e-5


def hooked(transformer, features, modules):
    """What `modules` (name -> module) give, by plain forward hooks; and the model's own end."""
    found = {}

    def keep(name):
        def hook(_module, _inputs, output):
            found[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            found[LAST] = transformer(dict(features))["token_embeddings"]
    finally:
        for handle in handles:
            handle.remove()
    return found


@by_readout
def test_layers_are_read_as_plain_hooks_read_them(transformer, probed, readout):
    wrapped, probe = probed
    for one in (transformer, wrapped):
        set_readout(one, Readout(readout.prompt))
    features = preprocessed(transformer, KINDS["mixed"])
    decoder = transformer.model.get_submodule(decoder_path(transformer.model))
    expected = hooked(transformer, features, dict(zip(LAYERS, decoder.layers, strict=True)))
    found = probe.read(features, [*LAYERS, LAST])
    for site in (*LAYERS, LAST):
        assert torch.equal(found[site], expected[site]), site
    for a, b in combinations(LAYERS, 2):
        assert not torch.allclose(found[a], found[b], atol=1e-3)


def test_the_last_hidden_state_is_after_the_final_norm(transformer, probed):
    set_readout(probed[0], Readout(PLAIN))
    found = probed[1].read(preprocessed(probed[0], KINDS["mixed"]), ["layers.2", LAST])
    decoder = transformer.model.get_submodule(decoder_path(transformer.model))
    with torch.no_grad():
        assert torch.equal(decoder.norm(found["layers.2"]), found[LAST])


@pytest.mark.parametrize("site", LAYERS[:2])
def test_a_readout_at_a_layer_is_what_the_probe_reads_there(transformer, probed, site):
    set_readout(transformer, Readout(PLAIN, site))
    set_readout(probed[0], Readout(PLAIN))
    features = preprocessed(transformer, KINDS["mixed"])
    with torch.no_grad():
        expected = transformer(dict(features))["token_embeddings"]
    assert torch.equal(probed[1].read(features, [site])[site], expected)


def test_the_site_before_the_mlp_is_the_residual_stream_after_attention(transformer, probed):
    for one in (transformer, probed[0]):
        set_readout(one, Readout(PLAIN))
    features = preprocessed(transformer, KINDS["mixed"])
    layer = transformer.model.get_submodule(decoder_path(transformer.model)).layers[1]
    gemma = residual_norm(transformer.model) == "pre_feedforward_layernorm"
    branch = layer.post_attention_layernorm if gemma else layer.self_attn
    decoder = transformer.model.get_submodule(decoder_path(transformer.model))
    expected = hooked(transformer, features, {"branch": branch, "entry": decoder.layers[0]})
    site = "layers.1.attention"
    found = probed[1].read(features, [site])[site]
    entry = expected["entry"]
    if transformer.config.model_type == "qwen3_vl":  # image features go in between, too
        text_nt = features["input_ids"] != image_token_id(transformer.config)
        found, entry = found[text_nt], entry[text_nt]
        expected["branch"] = expected["branch"][text_nt]
    assert torch.allclose(found, entry + expected["branch"], atol=1e-6)


@pytest.mark.parametrize("family", NEEDS)
def test_a_family_whose_processor_lacks_a_package_says_which_one(stand_in, family):
    lacking = missing(family)
    if not lacking:
        pytest.skip("nothing is missing here")
    line = f"{stand_in(family)}: its processor needs {lacking[0]}; `pip install {lacking[0]}`"
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        load_backbone(str(stand_in(family)))
