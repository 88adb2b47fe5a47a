"""Chats for processors without a chat template: the family's own layout, or pictures and text."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, processors
from transformers import AutoProcessor

from families import missing
from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.load import load_backbone, set_readout, with_readout
from patch_retriever.backbones.readout import PAPER_READOUT, PLAIN, Readout
from patch_retriever.items import Item

WITHOUT = ("paligemma2", "chameleon")
WITH = ("llava", "llava-onevision", "idefics3", "smolvlm", "gemma3", "qwen2-vl", "internvl")
by_family = pytest.mark.parametrize("family", WITHOUT)


class Red:
    """A picture."""

    name = "red"

    def open(self):
        picture = Image.new("RGB", (60, 40), "red")
        picture.paste("white", (0, 0, 20, 40))
        return picture


ITEMS = {
    "text": Item("two small dogs"),
    "image": Item(picture=Red()),
    "both": Item("two small dogs", Red()),
}
OFFICIAL = {
    "text": "two small dogs",
    "image": "<image>",
    "both": "<image>two small dogs",
}
"""The same as the family's own processor takes it."""


@pytest.fixture(scope="module")
def chameleon_of_the_hub(stand_in, tmp_path_factory):
    """The real one's tokenizer puts <s> before every text."""
    folder = tmp_path_factory.mktemp("bos") / "chameleon"
    shutil.copytree(stand_in("chameleon"), folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[start]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder_of(stand_in, chameleon_of_the_hub):
    return lambda name: chameleon_of_the_hub if name == "chameleon-of-the-hub" else stand_in(name)


def tokens(transformer, items):
    """Token ids and hidden states, without padding."""
    features = transformer.preprocess([item.load() for item in items])
    with torch.no_grad():
        found = transformer(dict(features))["token_embeddings"]
    mask_nt = features["attention_mask"].bool()
    return [
        (ids_t[mask_t], states_td[mask_t])
        for ids_t, states_td, mask_t in zip(features["input_ids"], found, mask_nt, strict=True)
    ]


@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("name", [*WITHOUT, "chameleon-of-the-hub"])
def test_hidden_states_are_those_of_the_family_s_own_processor(folder_of, name, kind):
    folder = folder_of(name)
    transformer = load_backbone(str(folder))
    processor = AutoProcessor.from_pretrained(folder)
    if name == "paligemma2" and kind == "text":  # which that one refuses: bos, text, end of line
        text = f"{processor.tokenizer.bos_token}{OFFICIAL[kind]}\n"
        official = processor.tokenizer(text, return_tensors="pt", return_token_type_ids=True)
        assert not official["token_type_ids"].any()
    else:
        images = None if kind == "text" else [Red().open()]
        official = processor(images=images, text=OFFICIAL[kind], return_tensors="pt")
        official.pop("labels", None)
    if name == "chameleon-of-the-hub":
        assert official["input_ids"][0, :2].tolist().count(processor.tokenizer.bos_token_id) == 1
    with torch.no_grad():
        expected_td = transformer.model(**official).last_hidden_state[0]
    ((ids_t, states_td),) = tokens(transformer, [ITEMS[kind]])
    assert torch.equal(ids_t, official["input_ids"][0])
    assert torch.equal(states_td, expected_td)
    in_a_batch = tokens(transformer, [*ITEMS.values()])
    ids_t, states_td = in_a_batch[list(ITEMS).index(kind)]
    assert torch.equal(ids_t, official["input_ids"][0])
    assert torch.allclose(states_td, expected_td, atol=1e-5)


@pytest.mark.parametrize("kind", ITEMS)
def test_every_token_of_paligemma_sees_every_other(stand_in, kind):
    transformer = load_backbone(str(stand_in("paligemma2")))
    features = transformer.preprocess([ITEMS[kind].load()])
    other = {**features, "input_ids": features["input_ids"].clone()}
    other["input_ids"][0, -1] = features["input_ids"][0, -2]  # the last token
    with torch.no_grad():
        seen, others = (transformer(dict(f))["token_embeddings"] for f in (features, other))
    assert (seen - others)[0, 0].abs().max() > 1e-3


@by_family
def test_the_export_loads_without_this_package_and_without_the_flag(stand_in, tmp_path, family):
    model = with_readout(load_backbone(str(stand_in(family))), PAPER_READOUT)
    model.save(str(tmp_path / "out"))
    picture = Red().open()
    plain = ["two small dogs", picture, {"image": picture, "text": "two small dogs"}]
    expected_nd = model.encode([item.load() for item in ITEMS.values()])
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.abs(again.encode(plain) - expected_nd).max() < 1e-5
    for item, expected_d in zip(plain, expected_nd, strict=True):
        assert np.abs(again.encode(item) - expected_d).max() < 1e-5
    twin = with_readout(load_backbone(str(tmp_path / "out")), PAPER_READOUT)
    found_nd = twin.encode([item.load() for item in ITEMS.values()])
    assert np.abs(found_nd - expected_nd).max() < 1e-5


def without_template(folder, copy):
    """A copy whose processor has no chat template."""
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (copy / name).is_file():
            values = json.loads((copy / name).read_text())
            values.pop("chat_template", None)
            (copy / name).write_text(json.dumps(values))
    return copy


@pytest.fixture
def template_less(stand_in, tmp_path):
    def load(family):
        if lacking := missing(family):
            pytest.skip(f"{family}: its processor needs {', '.join(lacking)}")
        return load_backbone(str(without_template(stand_in(family), tmp_path / family)))

    return load


@pytest.mark.parametrize("family", WITH)
def test_a_processor_saved_without_a_template_writes_pictures_and_then_text(
    stand_in, template_less, family
):
    transformer = template_less(family)
    own = load_backbone(str(stand_in(family)))
    set_readout(transformer, Readout(PLAIN))
    image = image_token_id(transformer.config)
    found = tokens(transformer, list(ITEMS.values()))
    for (ids_t, _), (own_ids_t, _), item in zip(
        found, tokens(own, list(ITEMS.values())), ITEMS.values(), strict=True
    ):
        assert (ids_t == image).sum() == (own_ids_t == image).sum()
        text = transformer.tokenizer.decode(ids_t, skip_special_tokens=True)
        assert text.strip().endswith(item.text or "")
        start = transformer.tokenizer("two small dogs")["input_ids"][0]
        if start == transformer.tokenizer.bos_token_id:
            assert int(ids_t[0]) == start
            assert int((ids_t == start).sum()) == 1
    if "qwen" in family:
        around = transformer.tokenizer.decode(found[1][0])
        assert around.startswith("<|vision_start|>")
        assert "<|vision_end|>" in around
    model = with_readout(transformer, PAPER_READOUT)
    together_nd = model.encode([item.load() for item in ITEMS.values()])
    for item, together_d in zip(ITEMS.values(), together_nd, strict=True):
        assert np.abs(model.encode([item.load()])[0] - together_d).max() < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_text_that_begins_like_a_template_changes_no_other(template_less, family):
    transformer = template_less(family)
    set_readout(transformer, Readout(PLAIN))
    begins = Item(f"{transformer.tokenizer.bos_token} a cat")
    (alone_t, _), *_ = tokens(transformer, [ITEMS["text"]])
    (_, (beside_t, _)) = tokens(transformer, [begins, ITEMS["text"]])
    assert torch.equal(alone_t, beside_t)
