"""Several processes that train one SAE together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from patch_retriever.sae.architectures import make_architecture
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.processes import Processes
from synthetic import sparse_tokens, write_store

STEPS = ["--steps", "80", "--lr", "5e-3", "--batch-size", "256", "--expansion", "4", "--k", "4",
         "--json", "--checkpoint-every", "10"]  # fmt: skip


def test_alone_there_is_nothing_to_share(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.launched("cpu")
    tensor = torch.randn(3)
    assert (alone.rank, alone.count, alone.device) == (0, 1, "cpu")
    assert alone.mean(tensor) is tensor
    assert alone.gather({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_gradients_of_the_halves_of_a_batch_have_the_wholes_as_their_mean(name):
    weights = Weights.random(16, 64, torch.Generator().manual_seed(0))
    weights = Weights(*(tensor.double() for tensor in vars(weights).values()))
    if name == "jumprelu":
        weights.threshold_c += 0.3
    options = {"bandwidth": 0.4, "l0_weight": 0.0} if name == "jumprelu" else {}
    learner = Learner(weights, make_architecture(name, 4, **options))
    x_nd = sparse_tokens(80, 16).double()

    def gradients(rows_nd):
        _, found = learner.gradient(rows_nd)
        everything = slice(0, 64)
        of_threshold = [] if found.threshold_c is None else [found.threshold_c]
        return [
            found.encoder(everything), found.decoder(everything), found.b_enc_c, found.b_dec_d,
            *of_threshold,
        ]  # fmt: skip

    whole, *halves = (gradients(rows_nd) for rows_nd in (x_nd, x_nd[:40], x_nd[40:]))
    assert len(whole) == (5 if name == "jumprelu" else 4)
    for all_of_it, first, second in zip(whole, *halves, strict=True):
        assert bool(all_of_it.any())
        assert torch.allclose(all_of_it, (first + second) / 2, atol=1e-12)


# real processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launched(store, out, *more, processes=2):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                "--master_port", str(free_port())] if processes > 1 else []  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "patch_retriever", "train-sae", str(store), "-o",
         str(out), *STEPS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def result_of(process):
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return json.loads(said)  # so only the first process spoke


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, sparse_tokens(4000))
    return folder


@pytest.fixture(scope="module")
def of_two(store, tmp_path_factory):
    """What two processes said, and the folder that they wrote."""
    out = tmp_path_factory.mktemp("two") / "out"
    return result_of(launched(store, out)), out


def test_two_processes_write_once_and_are_about_as_good_as_one(store, of_two, tmp_path):
    said, out = of_two
    assert {path.name for path in out.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    alone = result_of(launched(store, tmp_path / "one", processes=1))
    fvu, fvu_alone = (s["saes"]["."]["metrics"]["fvu"] for s in (said, alone))
    assert fvu == pytest.approx(fvu_alone, rel=0.25)
    assert fvu < 0.5


def weights_of(out):
    return (out / "sae_weights.safetensors").read_bytes()


def test_killed_processes_go_on_and_end_with_the_same_bytes(store, of_two, tmp_path):
    out = tmp_path / "out"
    process = launched(store, out)
    deadline = time.monotonic() + 100
    while not (out / "checkpoint/training.safetensors").is_file():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(children) == 2
    assert not (out / "cfg.json").exists()

    one = subprocess.run(
        [sys.executable, "-m", "patch_retriever", "train-sae", str(store), "-o", str(out), *STEPS],
        capture_output=True,
        text=True,
    )
    assert (one.returncode, one.stdout) == (2, "")
    assert "other settings, tokens or processes" in one.stderr

    result_of(launched(store, out))
    assert weights_of(out) == weights_of(of_two[1])
