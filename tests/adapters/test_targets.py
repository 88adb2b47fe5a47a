"""What is adapted in each family, and adapters that peft's own loader takes, in it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from families import FAMILIES, parameter
from patch_retriever.adapters.batches import captions_of
from patch_retriever.adapters.forward import PatchedForward
from patch_retriever.adapters.settings import METHODS, AdapterSettings
from patch_retriever.adapters.targets import adapter_config, target_modules
from patch_retriever.adapters.training import AdapterTrainer
from patch_retriever.backbones.adapter import Merged, inject, save_adapter, unload
from patch_retriever.backbones.inputs import preprocessed
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import PAPER, Readout
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import DOCUMENT, Patch
from patch_retriever.scenes.tasks import scenes_collection

TRAINING, VALIDATION = (scenes_collection(s, 20, 0) for s in ("calibration", "validation"))
SMALL = replace(
    VALIDATION, tasks=tuple(t for t in VALIDATION.tasks if t.name in ("t->i full", "i->t"))
)
SETTINGS = AdapterSettings(
    rank=2, steps=2, lr=1e-2, warmup=0, batch_size=4, hard_negatives=0, chunk_size=3,
    validate_every=2, captions=2, rebalancing=0.0,
)  # fmt: skip


@pytest.mark.parametrize("name", [parameter(name) for name in FAMILIES])
def test_the_decoder_is_adapted_and_nothing_else(stand_in, name):
    model = load_backbone(str(stand_in(name))).model
    found = target_modules(model, AdapterSettings())
    pattern = adapter_config(model, AdapterSettings()).target_modules
    matching = [n for n, _ in model.named_modules() if re.fullmatch(pattern, n)]
    assert sorted(matching) == sorted(found)
    assert all(isinstance(model.get_submodule(n), nn.Linear) for n in found)
    assert not any(part in n for n in found for part in ("vision", "visual", "projector", "vq"))
    assert {n.rpartition(".")[2] for n in found} >= {"q_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [parameter(n) for n in ("llava", "paligemma2", "qwen2-vl")])
def test_it_trains_saves_and_loads(stand_in, name, method, tmp_path):
    """Trained, saved, loaded by peft alone and merged: the same embeddings; the base unchanged."""
    settings = replace(SETTINGS, method=method)
    folder = str(stand_in(name))
    transformer, readout = load_backbone(folder), Readout(PAPER)
    forward = PatchedForward(transformer, readout, Patch(readout.site))
    chats = [item.load() for item in (TRAINING.items[0], TRAINING.items[70], TRAINING.items[130])]

    def embedded(one: PatchedForward) -> torch.Tensor:
        with torch.no_grad():
            return one.embed(one.pooled(preprocessed(one.transformer, chats)), DOCUMENT)

    before = embedded(forward)
    trainer = AdapterTrainer(
        forward, TRAINING, SMALL, captions_of(TRAINING, settings.captions), settings, 0, 32
    )
    torch.testing.assert_close(embedded(forward), before, atol=1e-6, rtol=0)  # does nothing yet
    trainer.train()
    trained = embedded(forward)
    assert (trained - before).abs().max() > 1e-4
    save_adapter(trainer.peft_model, tmp_path / "adapter", folder, {})
    trainer.close()
    assert torch.equal(embedded(forward), before)

    theirs = load_backbone(folder)
    PeftModel.from_pretrained(theirs.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(
        embedded(PatchedForward(theirs, readout, Patch(readout.site))), trained, atol=1e-5, rtol=0
    )
    with Merged(transformer, tmp_path / "adapter"):
        torch.testing.assert_close(embedded(forward), trained, atol=1e-5, rtol=0)
    assert torch.equal(embedded(forward), before)
    ours = inject(transformer, tmp_path / "adapter")
    torch.testing.assert_close(embedded(forward), trained, atol=1e-5, rtol=0)
    unload(ours)
    assert torch.equal(embedded(forward), before)


def test_the_projector_too(stand_in):
    model = load_backbone(str(stand_in("llava"))).model
    plain = target_modules(model, AdapterSettings())
    found = target_modules(model, AdapterSettings(projector=True))
    assert set(plain) < set(found)
    assert all("projector" in n for n in set(found) - set(plain))


def test_no_target_is_said_in_one_line(random_model):
    model = load_backbone(str(random_model)).model
    for layer in model.language_model.layers:
        for name in ("k_proj", "v_proj"):
            setattr(layer.self_attn, "my_" + name, getattr(layer.self_attn, name))
            delattr(layer.self_attn, name)
        layer.mlp.last = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(UserError, match=r"LlavaModel: no target module for ia3 .* use lora"):
        target_modules(model, AdapterSettings(method="ia3"))
    for layer in model.language_model.layers:
        layer.self_attn, layer.mlp = nn.Identity(), nn.Identity()
    with pytest.raises(UserError, match=r"no target module for lora found in 'language_model\.la"):
        target_modules(model, AdapterSettings())
    model.multi_modal_projector = nn.Identity()
    model.language_model.layers[0].mlp = nn.Linear(2, 2)
    with pytest.raises(UserError, match="no target module found in a projector"):
        target_modules(model, AdapterSettings(projector=True))
