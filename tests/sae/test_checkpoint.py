"""A training that is stopped goes on and ends as if it had not been, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from patch_retriever.activations.stream import Position
from patch_retriever.errors import UserError
from patch_retriever.sae.architectures import make_architecture
from patch_retriever.sae.checkpoint import FILE, Checkpoint
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.processes import Processes
from patch_retriever.sae.settings import SAESettings
from patch_retriever.sae.train import train_saes
from synthetic import MemorySource, sparse_tokens, write_store

SETTINGS = SAESettings(expansion=4, k=4, steps=60, batch_size=128, dead_after_tokens=1024, seed=0)
SEVERAL = (
    SETTINGS,
    replace(SETTINGS, architecture="jumprelu", precision="bf16"),
    replace(SETTINGS, architecture="matryoshka", k=2, expansion=2),
)


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_at(step):
    def watch(now):
        if now.step >= step:
            raise Stopped

    return watch


def train(source, folder, settings=SEVERAL, **options):
    options.setdefault("checkpoint_every", 7)
    return train_saes(source, settings, folder=folder, **options)


@pytest.fixture(scope="module")
def source():
    """Blocks that batches don't divide."""
    return MemorySource(sparse_tokens(2000), block=300, held_out=200)


@pytest.fixture(scope="module")
def unbroken(source):
    return train_saes(source, SEVERAL)


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.sae.state_dict().items():
            assert torch.equal(tensor, other.sae.state_dict()[name]), name
        assert one.about() == other.about()


def test_checkpoints_change_nothing(source, unbroken, tmp_path):
    assert_same(train(source, tmp_path), unbroken)


@pytest.mark.parametrize("stops", [[10], [20, 30], [10, 10, 50], [60]])
def test_a_stopped_training_ends_with_the_same_bits(stops, source, unbroken, tmp_path):
    for step in stops:
        with pytest.raises(Stopped):
            train(source, tmp_path, watch=stop_at(step))
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert_same(train(source, tmp_path), unbroken)


def test_it_goes_on_where_it_stood_with_the_figures_that_it_had(source, tmp_path):
    whole, rest = [], []
    train_saes(source, SEVERAL, watch=whole.append)
    with pytest.raises(Stopped):
        train(source, tmp_path, watch=stop_at(40))
    train(source, tmp_path, watch=rest.append)
    assert [now.step for now in rest] == [40, 50, 60]  # 35 was the last checkpoint
    for now, again in zip(whole[3:], rest, strict=True):
        assert (now.fvu, now.l0, now.dead) == (again.fvu, again.l0, again.dead)


def test_a_training_that_was_done_but_not_saved_is_only_converted(source, unbroken, tmp_path):
    train(source, tmp_path, checkpoint_every=60)
    seen = []
    assert_same(train(source, tmp_path, watch=seen.append), unbroken)
    assert seen == []


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 61},
        {"k": 5},
        {"seed": 1},
        {"lr": 1e-3},
        {"architecture": "batch-topk"},
        {"expansion": 2},
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(other, source, tmp_path):
    train(source, tmp_path, [SETTINGS])
    with pytest.raises(UserError, match=f"^{tmp_path / FILE}: from a training with other settings"):
        train(source, tmp_path, [replace(SETTINGS, **other)])


def test_a_checkpoint_of_more_saes_other_tokens_or_another_share_is_refused(source, tmp_path):
    train(source, tmp_path, [SETTINGS])
    others = MemorySource(sparse_tokens(2000, seed=1), block=300, held_out=200)
    pooled = MemorySource(
        sparse_tokens(2000), block=300, held_out=200, pooled_t=torch.arange(2000) % 9 == 0
    )
    for again in (
        lambda: train(source, tmp_path, [SETTINGS, SETTINGS]),
        lambda: train(others, tmp_path, [SETTINGS]),
        lambda: train(pooled, tmp_path, [SETTINGS], pooled_share=0.5),
    ):
        with pytest.raises(UserError, match="other settings, tokens or processes"):
            again()


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def foreign(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, path)


def without_a_tensor(path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    del tensors["0.b_dec_d"]
    save_file(tensors, path, about)


@pytest.mark.parametrize(
    "damage",
    [
        halve,
        cut_the_header,
        lambda p: p.write_text(""),
        lambda p: p.write_text("words" * 99),
        foreign,
        without_a_tensor,
    ],
)
def test_a_damaged_checkpoint_is_named_in_a_line(damage, source, tmp_path):
    train(source, tmp_path, [SETTINGS])
    damage(tmp_path / FILE)
    with pytest.raises(UserError, match=f"^{tmp_path / FILE}: no readable checkpoint") as caught:
        train(source, tmp_path, [SETTINGS])
    assert "\n" not in str(caught.value)


def make_learner(seed):
    weights = Weights.random(6, 20, torch.Generator().manual_seed(seed))
    return Learner(weights, make_architecture("topk", 3), dead_after=3, low_precision=True)


def test_everything_that_training_changes_comes_back(tmp_path):
    learners = [make_learner(0), make_learner(1)]
    x_nd = sparse_tokens(100, 6)
    for learner in learners:
        for _ in range(5):
            learner.step(x_nd, 0.01)
    Checkpoint(tmp_path, "key", learners, Processes()).save(5, Position(1, 2, 3), [0.1, 1 / 3])
    again = [make_learner(2), make_learner(3)]
    found = Checkpoint(tmp_path, "key", again, Processes()).load()
    assert found == (5, Position(1, 2, 3), [0.1, 1 / 3])
    for learner, other in zip(learners, again, strict=True):
        for name, tensor in learner.state().items():
            assert torch.equal(tensor, other.state()[name]), name
        assert torch.equal(learner.W_low_cd, other.W_low_cd)
        for _ in range(9):
            learner.step(x_nd, 0.01)
            other.step(x_nd, 0.01)
        assert torch.equal(learner.weights.W_enc_cd, other.weights.W_enc_cd)
        assert torch.equal(learner.weights.W_dec_cd, other.weights.W_dec_cd)


def test_without_a_folder_nothing_is_kept():
    checkpoint = Checkpoint(None, "key", [make_learner(0)], Processes())
    checkpoint.save(5, Position(1, 2, 3), [0.1])
    assert checkpoint.load() == (0, Position(), [1.0])


# a real process


def command(store, out, *more):
    return [sys.executable, "-m", "patch_retriever", "train-sae", str(store), "-o", str(out),
            "--steps", "300", "--batch-size", "512", "--expansion", "8", "--k", "4",
            "--checkpoint-every", "5", *more]  # fmt: skip


def weights_of(out):
    return (out / "sae_weights.safetensors").read_bytes()


def finished(*args):
    done = subprocess.run(command(*args), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def killed_in_mid_training(store, out):
    """Start a training and kill it as soon as it has written a checkpoint."""
    process = subprocess.Popen(command(store, out), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / FILE).is_file():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "cfg.json").exists()


def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(tmp_path):
    store, out = tmp_path / "store", tmp_path / "out"
    write_store(store, sparse_tokens(3000, 32))
    finished(store, tmp_path / "whole")
    killed_in_mid_training(store, out)

    other = subprocess.run(command(store, out, "--k", "5"), capture_output=True, text=True)
    assert (other.returncode, other.stdout) == (2, "")
    (line,) = other.stderr.splitlines()
    path = out / "checkpoint" / FILE
    assert line.startswith("Error: ")
    assert path.is_file()

    finished(store, out)
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert (out / "cfg.json").read_bytes() == (tmp_path / "whole/cfg.json").read_bytes()
    for folder in (out, tmp_path / "whole"):
        assert {p.name for p in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
