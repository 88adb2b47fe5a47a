"""Strict loading: what would be partly random, or does not load, is told in one line."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration

from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.strict import check_loaded, strict_loading
from patch_retriever.errors import UserError
from patch_retriever.retrieval.load import load_encoder

Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(random_model, tmp_path):
    return shutil.copytree(random_model, tmp_path / "model")


@pytest.fixture
def sharded(random_model, folder):
    """The same model in many files, as large models are."""
    model = LlavaForConditionalGeneration.from_pretrained(random_model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def refusal(load, name):
    with pytest.raises(UserError) as error:
        load(str(name))
    line = str(error.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    return line.removeprefix(f"{name}: ")


def rewrite(folder, change):
    """Save the weights again after `change` (of a dictionary, in place)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop(Q_PROJ))
    said = refusal(load_backbone, folder)
    assert said.startswith("1 tensor has no values in its files (language_model.layers.1.self_attn")
    assert "q_proj.weight)" in said


def test_of_many_missing_tensors_the_first_are_named_and_all_counted(folder):
    def without_vision(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower")]:
            gone.append(tensors.pop(name))

    gone = []
    rewrite(folder, without_vision)
    said = refusal(load_backbone, folder)
    assert said.startswith(f"{len(gone)} tensors have no values in its files (vision_tower.")
    assert said.count("vision_tower.") == 3
    assert ", ...)" in said


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    rewrite(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(16, 32)}))
    said = refusal(load_backbone, folder)
    assert "1 tensor has another shape than config.json says" in said
    assert "q_proj.weight [16, 32] for [32, 32]" in said


def test_a_tensor_that_the_backbone_has_no_place_for_is_left_out(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 32)}))
    load_backbone(str(folder))


def test_tied_tensors_are_not_missing(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    with strict_loading("tied"):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_an_embedding_that_nothing_is_tied_to_is_missing(folder):
    rewrite(folder, lambda tensors: tensors.pop("language_model.model.embed_tokens.weight"))
    with pytest.raises(UserError, match="embed_tokens"), strict_loading("tied"):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_buffers_and_bert_s_pooler_do_not_count_and_parameters_do():
    model = nn.Module()
    model.pooler, model.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    info = {"missing_keys": {"pooler.weight", "norm.running_mean"}, "mismatched_keys": set()}
    check_loaded("bert", model, info)
    info["missing_keys"].add("norm.weight")
    with pytest.raises(UserError, match=r"^bert: 1 tensor .*\(norm.weight\)"):
        check_loaded("bert", model, info)


def test_a_whole_sharded_model_loads_as_the_same_model(sharded, random_model):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 5
    expected = load_backbone(str(random_model)).state_dict()
    found = load_backbone(str(sharded)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_missing_shard_is_named(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[3:5]
    first.unlink()
    said = refusal(load_backbone, sharded)
    assert f"{first.name}, which model.safetensors.index.json names, missing" in said
    second.unlink()
    assert f"{first.name} and 1 more, which" in refusal(load_backbone, sharded)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard.name} is damaged, fetch it again" in refusal(load_backbone, sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_told(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    assert f"{index.name} is damaged" in refusal(load_backbone, sharded)


def test_a_shard_without_a_tensor_that_the_index_names(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    key = next(key for key in index if key.endswith("layers.1.self_attn.q_proj.weight"))
    tensors = load_file(sharded / index[key])
    del tensors[key]
    save_file(tensors, sharded / index[key], {"format": "pt"})
    assert "layers.1.self_attn.q_proj.weight" in refusal(load_backbone, sharded)


def test_an_exported_folder_that_lacks_tensors_is_refused_too(finished_build, tmp_path):
    folder = shutil.copytree(finished_build, tmp_path / "export")
    weights = folder / "model.safetensors"
    (name, *_), tensors = sorted(load_file(weights)), load_file(weights)
    weights.unlink()
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    assert "1 tensor has no values" in refusal(load_encoder, folder)
    with pytest.raises(UserError, match="1 tensor has no values"):
        load_encoder(f"{folder}@base")


def test_transformers_is_as_before_after_loading(folder):
    with strict_loading("a"), pytest.raises(UserError), strict_loading("b"):
        raise OSError
    rewrite(folder, lambda tensors: tensors.pop(Q_PROJ))
    AutoModel.from_pretrained(folder)
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) == 1


def test_whoever_asks_for_the_loading_info_gets_it(random_model):
    with strict_loading("model"):
        _, info = AutoModel.from_pretrained(random_model, output_loading_info=True)
    assert not info["missing_keys"]


def test_a_processor_of_text_alone_is_told(folder):
    (folder / "processor_config.json").unlink()
    assert "no image part" in refusal(load_backbone, folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    assert "no image part" in refusal(load_backbone, folder)


def test_accelerate_is_asked_for_where_a_device_map_needs_it(folder, monkeypatch):
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", bool)
    assert "pip install accelerate" in refusal(partial(load_backbone, device_map="auto"), folder)


@pytest.fixture
def qwen2_vl(random_model, tmp_path):
    """A Qwen2-VL, whose processor needs torchvision for videos."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e4,
            },
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )
    folder = tmp_path / "qwen2-vl"
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (random_model / name).read_text()
        (folder / name).write_text(text.replace("LlavaProcessor", "Qwen2VLProcessor"))
    values = {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_torchvision_is_asked_for_where_a_family_needs_it(qwen2_vl, monkeypatch):
    from transformers.utils import import_utils

    missing = (lambda: False, import_utils.BACKENDS_MAPPING["torchvision"][1])
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "torchvision", missing)
    said = refusal(load_backbone, qwen2_vl)
    assert "pip install torchvision" in said
    assert torch.__version__ in said


def test_a_torchvision_of_another_torch_is_told():
    with pytest.raises(UserError, match="pip install torchvision"), strict_loading("qwen"):
        raise RuntimeError("operator torchvision::nms does not exist")
