"""The differentiable patched forward pass: the live model's embeddings, and true gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from patch_retriever import PatchedRetriever
from patch_retriever.adapters.forward import PatchedForward
from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.inputs import preprocessed
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import ONE_WORD, PAPER, Readout
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import Affine, Gate, Subtract
from patch_retriever.scenes.tasks import scenes_collection

ITEMS = scenes_collection("test", 20, 0).items
SOME = [ITEMS[i] for i in (0, 1, 70, 71, 130, 131)]
D = 32


def subtract(seed, m=5):
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(m, D, generator=g), dim=1)
    return Subtract(
        torch.arange(m), torch.full((m,), 0.7), rows.T.clone(), torch.zeros(m),
        torch.full((m,), 0.05), rows,
    )  # fmt: skip


def affine(by, groups, seed):
    g = torch.Generator().manual_seed(seed)
    return Affine(
        "some", by, torch.randn(groups, D, 8, generator=g), torch.randn(groups, 8, generator=g)
    )


def gate():
    g = torch.Generator().manual_seed(9)
    return Gate(torch.randn(2, D, generator=g), torch.zeros(2), 0.1)


PATCHES = {
    "identity": lambda site: Patch(site),
    "subtraction and maps by role": lambda site: Patch(site, subtract(0), (affine("role", 2, 1),)),
    "maps by modality": lambda site: Patch(site, subtract(0), (affine("modality", 3, 1),), gate()),
    "in a layer, too": lambda site: Patch(
        site, subtract(0), (affine("role", 2, 1),), layers={"layers.0": subtract(4)}
    ),
}
READOUTS = [Readout(PAPER), Readout(ONE_WORD, pooling="lasttoken"), Readout(PAPER, "layers.1")]


@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: r.name)
@pytest.mark.parametrize("name", PATCHES)
def test_it_embeds_as_the_live_model_does(random_model, name, readout):
    patch = PATCHES[name](readout.site)
    live = PatchedRetriever(with_readout(load_backbone(str(random_model)), readout), patch)
    chats = [item.load() for item in SOME]
    forward = PatchedForward(load_backbone(str(random_model)), readout, patch)
    with torch.no_grad():
        pooled = forward.pooled(preprocessed(forward.transformer, chats))
    for role, encode in ((QUERY, live.encode_query), (DOCUMENT, live.encode_document)):
        expected = encode(chats, convert_to_tensor=True)
        torch.testing.assert_close(forward.embed(pooled, role), expected, atol=1e-5, rtol=0)


def exact_norm(norm, x):
    """RMSNorm, which transformers computes in float32 whatever comes in."""
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def loss_of(forward, features, target_ne, energies=False):
    pooled = forward.pooled(features, energies)
    loss = (forward.embed(pooled, QUERY).double() * target_ne.double()).sum()
    return loss + (1e-2 * pooled.energy_ng.double().sum() if energies else 0)


@pytest.mark.parametrize("name", PATCHES)
def test_gradients_through_the_patch_are_finite_differences(random_model, name):
    """Of a weight in the first layer, before every subtraction; in float64."""
    transformer = load_backbone(str(random_model), dtype="float64")
    readout = Readout(PAPER)
    patch = PATCHES[name](readout.site)
    forward = PatchedForward(transformer, readout, patch)
    forward.patch = doubled(patch)
    forward._gate = forward._gate and forward.patch.gate
    forward._maps = {r: (w.double(), b.double()) for r, (w, b) in forward._maps.items()}
    features = preprocessed(transformer, [item.load() for item in SOME])
    layers = transformer.model.get_submodule(layers_path(transformer.model))
    weight = layers[0].mlp.down_proj.weight.requires_grad_()
    width = 8 if patch.maps else D
    g = torch.Generator().manual_seed(0)
    target = torch.randn(len(SOME), width, generator=g)
    pairs = []
    with pytest.MonkeyPatch.context() as patching:  # what is float32 otherwise
        patching.setattr(torch.Tensor, "float", torch.Tensor.double)
        patching.setattr(Qwen2RMSNorm, "forward", exact_norm)
        (gradient,) = torch.autograd.grad(loss_of(forward, features, target), weight)
        for seed in range(3):
            way = torch.randn(weight.shape, generator=g.manual_seed(seed), dtype=weight.dtype)
            with torch.no_grad():
                ends = []
                for step in (1e-5, -1e-5):
                    weight += step * way
                    ends.append(float(loss_of(forward, features, target)))
                    weight -= step * way
            pairs.append((float((gradient * way).sum()), (ends[0] - ends[1]) / 2e-5))
    for analytic, numeric in pairs:
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-7)
    assert max(abs(a) for a, _ in pairs) > 1e-3


def doubled(patch):
    """The same patch in float64."""

    def to(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, (Subtract, Affine, Gate)):
            return type(value)(**{k: to(v) for k, v in vars(value).items()})
        return value

    layers = {site: to(one) for site, one in patch.layers.items()}
    return Patch(
        patch.site, to(patch.subtract), tuple(map(to, patch.maps)), to(patch.gate), {}, layers
    )


@pytest.mark.parametrize("name", ["maps by modality", "in a layer, too"])
def test_checkpointing_changes_no_gradient(random_model, name):
    from patch_retriever.sae.model import SparseAutoencoder

    one = subtract(0, 12)
    sae = SparseAutoencoder(
        one.W_enc_dm, one.b_enc_m, one.W_dec_md, torch.zeros(D), one.threshold_m
    )
    readout = Readout(PAPER)
    transformer = load_backbone(str(random_model))
    forward = PatchedForward(
        transformer, readout, PATCHES[name](readout.site), lambda t: sae.encode(t), "layers.0"
    )
    features = preprocessed(transformer, [item.load() for item in SOME])
    layers = transformer.model.get_submodule(layers_path(transformer.model))
    weight = layers[0].mlp.down_proj.weight.requires_grad_()
    target = torch.randn(len(SOME), 8, generator=torch.Generator().manual_seed(0))
    (plain,) = torch.autograd.grad(loss_of(forward, features, target, True), weight)
    transformer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True
    (checkpointed,) = torch.autograd.grad(loss_of(forward, features, target, True), weight)
    torch.testing.assert_close(plain, checkpointed)
    assert plain.abs().max() > 0
