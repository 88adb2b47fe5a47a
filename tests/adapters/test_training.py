"""The training: gradients of one large pass, a stopped one that goes on, memory that runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patch_retriever.adapters import training as module
from patch_retriever.adapters.batches import captions_of
from patch_retriever.adapters.checkpoint import AdapterCheckpoint
from patch_retriever.adapters.forward import PatchedForward
from patch_retriever.adapters.looks import Look
from patch_retriever.adapters.losses import ConceptGroups
from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.adapters.training import AdapterTrainer
from patch_retriever.backbones.cut import cut_at
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import ONE_WORD, Readout
from patch_retriever.concepts.query import TABLE
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import Patch
from patch_retriever.sae.formats import load_sae
from patch_retriever.scenes.tasks import scenes_collection
from patch_retriever.stages.readout import load_readout

TRAINING, VALIDATION = (scenes_collection(s, 20, 0) for s in ("calibration", "validation"))
SETTINGS = AdapterSettings(
    rank=4, steps=6, lr=1e-2, warmup=2, batch_size=6, hard_negatives=1, validate_every=2,
    captions=3, captions_per_step=2, rebalancing=0.3, patience=50,
)  # fmt: skip


@pytest.fixture
def trainer(finished_build, random_model):
    """`trainer(steps=..)` is a trainer through the patch of a small build."""
    made = []

    def make(**changed):
        settings = replace(SETTINGS, **changed)
        run = finished_build / "run"
        patch = Patch.load(run / "select" / "patch")
        groups = ConceptGroups.of(load_sae(run / "sae"), ConceptTable.load(run / "score" / TABLE))
        forward = PatchedForward(
            load_backbone(str(random_model)), load_readout(run / "readout"), patch, groups.energy
        )
        captions = captions_of(TRAINING, settings.captions)
        made.append(AdapterTrainer(forward, TRAINING, VALIDATION, captions, settings, 0))
        return made[-1]

    yield make
    for one in made:
        one.close()


def gradients(trainer, number=3):
    """Of a batch, after the adapter was moved away from doing nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.parameters.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        parameter.grad = None
    batch, chunks = trainer._prepared(trainer.forward.transformer, number)
    found = trainer.backward(number, batch, chunks)
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trainer.parameters.items()
    }
    return found, grads, len(chunks)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_chunks_have_the_gradients_of_one_pass(trainer, chunk_size):
    """All three losses together; dense autograd over the whole batch is the reference."""
    found, expected, n = gradients(trainer(chunk_size=1000))
    assert n == 1
    chunked, mine, n = gradients(trainer(chunk_size=chunk_size))
    assert n > 1
    for key in ("contrastive", "rebalancing", "retention"):
        assert chunked[key] == pytest.approx(found[key], rel=1e-4)
        assert found[key] > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-3)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3


@pytest.mark.parametrize("weights", [
    {"rebalancing": 0.0, "retention": 0.0}, {"contrastive": 0.0, "retention": 0.0},
])  # fmt: skip
def test_a_loss_without_weight_is_not_computed(trainer, weights):
    found, expected, _ = gradients(trainer(chunk_size=1000, **weights))
    assert not set(found) & set(weights)
    _, mine, _ = gradients(trainer(chunk_size=5, **weights))
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5, rtol=1e-3)


def test_checkpointing_runs_layers_again_for_the_same_gradients(trainer):
    """In a training itself, which alone turns it on."""
    _, expected, _ = gradients(trainer(chunk_size=1000))
    one, calls = trainer(chunk_size=1000, gradient_checkpointing=True), []
    layer = one.forward.transformer.model.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with one._in_training():
        _, mine, _ = gradients(one)
    assert calls.count(True) == 2 * (1 + SETTINGS.captions_per_step)  # of the batch and captions
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-4)
    assert not one.forward.transformer.model.is_gradient_checkpointing


def test_it_learns_and_leaves_the_backbone_as_it_was(trainer, finished_build):
    one = trainer(steps=30, validate_every=15)
    model = one.forward.transformer.model
    trained = one.train()
    losses = [look.contrastive for look in trained.looks[1:]]
    assert [look.step for look in trained.looks] == [0, 15, 30]
    assert losses[1] < losses[0]
    assert trained.looks[0].up_share > 0
    assert max(look.validation_score for look in trained.looks) == (
        trained.looks[trained.best].validation_score
    )
    one.close()
    cut = load_readout(finished_build / "run" / "readout").cut
    whole = load_backbone(str(one.forward.transformer.model.config.name_or_path))
    expected = cut_at(whole, cut).model
    assert not any(p.requires_grad for p in model.parameters())
    for (name, mine), (other, theirs) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


class Stopped(Exception):
    pass


def test_a_stopped_training_ends_as_an_unbroken_one(trainer, tmp_path):
    unbroken = trainer()
    expected = unbroken.train()
    checkpoint = AdapterCheckpoint(tmp_path / "training", "key")

    def stop(look):
        if look.step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        trainer().train(checkpoint, stop)
    again, seen = trainer(), []
    found = again.train(checkpoint, seen.append)
    assert [look.step for look in seen] == [6]
    assert found.best == expected.best
    for a, b in zip(found.looks, expected.looks, strict=True):
        assert replace(a, seconds=0) == replace(b, seconds=0)
    for name, values in weights(unbroken).items():
        assert torch.equal(values, weights(again)[name])


def test_a_checkpoint_of_another_training_is_as_none_and_a_damaged_one_is_named(trainer, tmp_path):
    path = tmp_path / "training"
    one = trainer(steps=2)
    one.train(AdapterCheckpoint(path, "one"))
    assert AdapterCheckpoint(path, "other").load(one.parameters, one.optimiser) is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="no readable checkpoint"):
        AdapterCheckpoint(path, "one").load(one.parameters, one.optimiser)


def test_it_stops_when_validation_no_longer_rises(trainer, monkeypatch):
    scores = iter([0.5, 0.6, 0.55, 0.6, 0.9])
    look = AdapterTrainer._look
    monkeypatch.setattr(
        AdapterTrainer,
        "_look",
        lambda self, *args: replace(look(self, *args), validation_score=next(scores)),
    )
    one = trainer(steps=20, patience=2)
    at_best = {}

    def watch(seen):
        if seen.validation_score == 0.6 and not at_best:
            at_best.update(weights(one))

    trained = one.train(watch=watch)
    assert [found.step for found in trained.looks] == [0, 2, 4, 6]
    assert trained.best == 1
    assert trained.to_json()["best_step"] == 2
    one.keep(trained.best_weights)
    for name, values in at_best.items():
        assert torch.equal(values, weights(one)[name])


def test_one_that_had_ended_when_it_was_stopped_ends_at_once(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(
        AdapterTrainer,
        "_look",
        lambda _self, step, _means, seconds: Look(step, 0, 0, 0, 0, 0, -step, 0, seconds),
    )
    checkpoint = AdapterCheckpoint(tmp_path / "training", "key")
    expected = trainer(steps=20, patience=2).train(checkpoint)
    found = trainer(steps=20, patience=2).train(checkpoint)
    assert [look.step for look in found.looks] == [look.step for look in expected.looks]
    assert found.looks[-1].step == 4


def test_two_batches_to_a_step_are_the_mean_of_their_gradients(trainer):
    _, first, _ = gradients(trainer(), 0)
    _, second, _ = gradients(trainer(), 1)
    both = trainer(accumulate=2)
    gradients(both, 0)
    batch, chunks = both._prepared(both.forward.transformer, 1)
    both.backward(1, batch, chunks)
    for name, parameter in both.parameters.items():
        expected = (first[name] + second[name]) / 2
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])  # fmt: skip
def test_memory_that_runs_out_is_said_with_what_to_lower(trainer, monkeypatch, error):
    one = trainer()

    def fail(*_):
        raise error

    monkeypatch.setattr(one, "backward", fail)
    with pytest.raises(UserError, match=r"chunk_size \(now 64.*gradient checkpointing"):
        one.train()


def test_other_errors_are_not_taken_for_it(trainer, monkeypatch):
    one = trainer()
    monkeypatch.setattr(one, "backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.train()


def test_the_rate_rises_and_falls():
    rates = [module._rate(step, 4, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_retention_begins_at_zero(trainer):
    one = trainer(rebalancing=0.0)
    assert float(one._captions.loss([0, 1, 2])) == pytest.approx(0, abs=1e-6)


def test_captions_are_asked_about_without_the_readout(trainer):
    """The model's own words around picture and caption, and the caption's tokens at the end."""
    one = trainer()
    tokenizer = one.forward.transformer.tokenizer
    (_, text), *_ = captions_of(TRAINING, 3)
    first = one._captions._captions[0]
    ids = first.features["input_ids"][0]
    said = tokenizer.decode(ids[-first.n_tokens :], skip_special_tokens=True)
    assert said.strip() == text
    assert ONE_WORD.image not in tokenizer.decode(ids)
    assert "describe the image." in tokenizer.decode(ids)
    assert Readout(ONE_WORD).prompt.image
