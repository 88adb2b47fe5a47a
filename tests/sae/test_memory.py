"""What the allocator is told changes nothing but speed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from patch_retriever.sae.memory import keep_freed_memory

TRAIN = """
import torch
from patch_retriever.sae.architectures import make_architecture
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.memory import keep_freed_memory

torch.set_num_threads(1)
kept = {kept} and keep_freed_memory()
generator = torch.Generator().manual_seed(0)
learner = Learner(Weights.random(16, 64, generator), make_architecture("batch-topk", 4))
for _ in range(20):
    learner.step(torch.randn(700, 16, generator=generator), 0.01)
total = sum(tensor.double().sum() for tensor in learner.state().values())
print(kept, float(total).hex())
"""


def trained(kept):
    """In a process of its own, because an allocator is told once and for all."""
    code = TRAIN.format(kept=kept)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return out.stdout.split()


def test_training_gives_the_same_bits():
    (told, with_it), (not_told, without) = trained(True), trained(False)
    assert (told in ("True", "False"), not_told) == (True, "False")
    assert with_it == without


def test_it_says_whether_it_was_done():
    assert isinstance(keep_freed_memory(), bool)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_glibc_is_told():
    assert keep_freed_memory() is hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_another_c_library_is_left_alone(error, monkeypatch):
    def missing(name):
        raise error(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert keep_freed_memory() is False


@pytest.mark.parametrize("answers", [[0, 1], [1, 0]])
def test_it_is_not_done_where_the_library_refuses(answers, monkeypatch):
    class Library:
        mallopt = staticmethod(lambda parameter, value: remaining.pop(0))  # noqa: ARG005

    remaining = list(answers)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)  # noqa: ARG005
    assert keep_freed_memory() is False
