"""Records of families, and models of families that have none."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from families import FAMILIES as STAND_INS
from families import missing
from families.snapshot import TEXT, VISION, byte_level_backend, save
from patch_retriever.backbones.families import (
    FAMILIES,
    assumed,
    decoder_path,
    family_of,
    final_norm_path,
    layers_path,
    n_layers,
)
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import PAPER_READOUT
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.probe import Probe


def test_every_model_type_is_of_one_family_and_known_to_transformers():
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(set(types)) == len(types)
    assert set(types) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("name", STAND_INS)
def test_the_record_says_what_probing_would_find(stand_in, name, monkeypatch):
    if lacking := missing(name):
        pytest.skip(f"{name}: its processor needs {', '.join(lacking)}")
    transformer = load_backbone(str(stand_in(name)))
    model = transformer.model
    family = family_of(transformer.config)
    assert family is not None
    recorded = decoder_path(model), layers_path(model), n_layers(model), final_norm_path(model)
    assert recorded[2] == 3
    assert type(model.get_submodule(recorded[3])).__name__.lower().endswith("norm")
    assert assumed(model) is None
    monkeypatch.setattr("patch_retriever.backbones.families._OF_TYPE", {})
    probed = decoder_path(model), layers_path(model), n_layers(model), final_norm_path(model)
    assert probed == recorded


@pytest.mark.parametrize("name", STAND_INS)
def test_the_last_hidden_state_is_the_last_of_hidden_states(stand_in, name):
    if lacking := missing(name):
        pytest.skip(f"{name}: its processor needs {', '.join(lacking)}")
    transformer = load_backbone(str(stand_in(name)))
    features = transformer.preprocess([Item("a cat").load()])
    tensors = {k: v for k, v in features.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        out = transformer.model(**tensors, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(out.hidden_states) == n_layers(transformer.model) + 1


TEMPLATE = """\
{{ bos_token }}{% for message in messages %}[INST]{% for part in message['content'] %}\
{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]\
{% endfor %}"""


@pytest.fixture(scope="module")
def mistral3(tmp_path_factory):
    """A small Mistral 3, of which there is no record."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("unknown") / "mistral3"
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(*special, "<pad>"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(special[3:]),
    )
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(
            **{**VISION, "head_dim": 16}, image_size=56, patch_size=14
        ),
        text_config=MistralConfig(vocab_size=len(tokenizer) + 9, **TEXT, head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "size": {"longest_edge": 56},
            "patch_size": {"height": 14, "width": 14},
        },
        "processor_config.json": {
            "processor_class": "PixtralProcessor",
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
    }
    save(folder, Mistral3ForConditionalGeneration, config, tokenizer, files, TEMPLATE)
    return folder


class Red:
    """A picture."""

    name = "red"

    def open(self):
        from PIL import Image

        return Image.new("RGB", (56, 42), "red")


ITEMS = (Item("a cat"), Item(picture=Red()), Item("a cat", Red()))


def test_a_family_without_a_record_works_and_says_what_was_assumed(mistral3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transformer = load_backbone(str(mistral3))
    said = [str(w.message) for w in caught if "no record" in str(w.message)]
    image = transformer.config.image_token_index
    assert said == [
        f"{mistral3}: no record of the family 'mistral3'; taken: 3 decoder layers at "
        f"'language_model.layers', the final norm at 'language_model.norm', image token {image}"
    ]
    chats = [item.load() for item in ITEMS]
    together_nd = with_readout(transformer, PAPER_READOUT).encode(chats)
    for chat, expected_d in zip(chats, together_nd, strict=True):
        found_d = with_readout(transformer, PAPER_READOUT).encode([chat])[0]
        assert np.abs(found_d - expected_d).max() < 1e-5
    features = transformer.preprocess(chats)
    tensors = {
        k: v
        for k, v in features.items()
        if isinstance(v, torch.Tensor) and k != "num_images_per_sample"
    }
    with torch.no_grad():
        expected = transformer.model(**tensors, output_hidden_states=True).hidden_states[2]
    assert torch.equal(Probe(transformer).read(features, ["layers.1"])["layers.1"], expected)


def test_a_model_without_anything_like_a_decoder_is_refused_in_one_line():
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    line = "BertModel: no parts of its module tree look like the decoder; "
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        decoder_path(model)
