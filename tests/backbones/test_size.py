"""A backbone's size from its config: that of the loaded model, in every family."""

from __future__ import annotations

import json

import pytest

from families import FAMILIES, parameter
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.size import ASSUMED_IMAGE_TOKENS, backbone_size
from patch_retriever.errors import UserError


@pytest.mark.parametrize("name", [parameter(name) for name in FAMILIES])
def test_a_familys_size_is_that_of_its_model(name, stand_in):
    folder = stand_in(name)
    size, transformer = backbone_size(str(folder)), load_backbone(str(folder))
    assert size.parameters == sum(p.numel() for p in transformer.model.parameters())
    assert size.layers == n_layers(transformer.model)
    assert size.width == transformer.get_embedding_dimension()
    assert 0 < size.decoder_parameters < size.parameters


def test_no_weights_are_read(stand_in, tmp_path):
    config = (stand_in("llava") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert backbone_size(str(tmp_path)) == backbone_size(str(stand_in("llava")))


def test_image_tokens_are_those_that_a_config_says_or_assumed(stand_in, tmp_path):
    config = json.loads((stand_in("llava") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_seq_length": 77}))
    found = backbone_size(str(tmp_path))
    assert (found.image_tokens, found.image_tokens_from) == (77, "image_seq_length in its config")
    size = backbone_size(str(stand_in("qwen2-vl")))
    assert size.image_tokens == ASSUMED_IMAGE_TOKENS
    assert "assumed" in size.image_tokens_from


def test_a_config_that_is_no_models_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(UserError, match="its size cannot be read") as error:
        backbone_size(str(tmp_path))
    assert "\n" not in str(error.value)
