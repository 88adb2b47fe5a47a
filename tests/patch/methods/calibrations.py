"""A small synthetic calibration split, and every patch that a method makes of it."""

from __future__ import annotations

import torch

from patch_retriever.concepts.scores import score_concepts
from patch_retriever.features import Features
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.fit import GradedTask, fit_gate
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

PER_KIND, D, C = 24, 72, 300
N = 3 * PER_KIND
KINDS_N = torch.arange(3).repeat_interleave(PER_KIND)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_calibration(seed=0):
    """Texts, images and both; item n of each kind is about the same thing."""
    meaning_nd = normal(PER_KIND, D, seed=1).repeat(3, 1)
    x_nd = meaning_nd + 0.3 * normal(N, D, seed=2) + 8 * torch.eye(3, D)[KINDS_N]
    rows_cd = torch.nn.functional.normalize(normal(C, D, seed=3), dim=1)
    sae = SparseAutoencoder(
        rows_cd.T.clone(), torch.zeros(C), rows_cd, torch.zeros(D), torch.ones(C)
    )
    features = Features(x_nd, x_nd, Codes.from_dense(sae.encode(x_nd)), KINDS_N.to(torch.int8))
    numbers = torch.arange(PER_KIND)
    text, image, both = numbers, numbers + PER_KIND, numbers + 2 * PER_KIND
    pairs = {
        "t->i": torch.stack([text, image], 1),
        "i->t": torch.stack([image, text], 1),
        "it->i": torch.stack([both, image], 1),
    }
    crossing = torch.cat([pairs["t->i"], pairs["i->t"]])
    wrong = torch.stack([crossing[:, 0], crossing[:, 1].roll(1)], 1)
    concepts = score_concepts(features, rows_cd, crossing, wrong, wrong)
    queries, documents = torch.arange(N), torch.arange(N).flip(0)[: 2 * PER_KIND]
    gate = fit_gate(features.mean_nd, KINDS_N)
    return Calibration(
        "last_hidden_state",
        features,
        sae,
        concepts,
        gate,
        queries,
        documents,
        pairs,
        tasks_of(pairs),
        seed,
    )


def tasks_of(pairs):
    """A task for each direction: every query's document among those of all."""
    return tuple(
        GradedTask.of(p[:, 0].tolist(), p[:, 1].tolist(), [(i,) for i in range(len(p))])
        for p in pairs.values()
    )


def every_patch(method):
    return [(setting, patch) for setting in method.grid for patch in method.make(**setting)]
