"""Training: one pass over a stream of activations, for one SAE or several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_retriever.activations.stream import Source, batches
from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.progress import Progress, no_progress
from patch_retriever.sae.architectures import make_architecture
from patch_retriever.sae.checkpoint import CHECKPOINT_FORMAT, Checkpoint
from patch_retriever.sae.convert import Conversion, convert
from patch_retriever.sae.learner import Learner, Loss, Weights
from patch_retriever.sae.memory import keep_freed_memory
from patch_retriever.sae.metrics import SAEMetrics, measure
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.ops import PreActivations, sampled_products, topk_of_batch
from patch_retriever.sae.processes import Processes
from patch_retriever.sae.scale import InputScale, scaled_input
from patch_retriever.sae.settings import SAESettings, training_steps
from patch_retriever.sae.shared import SharedConcepts

HELD_OUT_TOKENS = 16_384
"""Tokens that no training saw: thresholds and figures come from them, one half each."""


@dataclass(frozen=True)
class Now:
    """How training goes, for who watches: figures of the SAEs in their order."""

    step: int
    tokens_per_second: float
    fvu: list[float]
    l0: list[float]
    dead: list[float]


Watch = Callable[[Now], None]


@dataclass(frozen=True)
class Normalisation:
    """What training sees of activations: scaled per token or not, less a mean, over one scale."""

    input_scale: InputScale
    mean_d: Tensor
    scale: float

    @classmethod
    def of(cls, x_nd: Tensor, input_scale: InputScale, processes: Processes) -> Normalisation:
        """By the mean (d,) of some tokens and the root mean square distance from it."""
        x_nd = scaled_input(x_nd, input_scale)
        mean_d = processes.mean(x_nd.mean(0))
        square = processes.mean((x_nd - mean_d).square().sum(1).mean())
        return cls(input_scale, mean_d, max(float(square) ** 0.5, 1e-12))

    def __call__(self, x_nd: Tensor) -> Tensor:
        """Of raw activations (..., d)."""
        return (scaled_input(x_nd, self.input_scale) - self.mean_d) / self.scale


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE with its settings and what was measured of it on tokens that it never saw."""

    sae: SparseAutoencoder
    settings: SAESettings
    conversion: Conversion
    metrics: SAEMetrics
    dead_in_training: float
    """Share of concepts that no token fired of the last `dead_after_tokens` in training."""

    def about(self) -> dict[str, Any]:
        """Settings and figures, as JSON values."""
        return {
            "settings": asdict(self.settings),
            "conversion": asdict(self.conversion),
            "metrics": self.metrics.to_json(),
            "dead_in_training": self.dead_in_training,
        }


def train_saes(
    source: Source,
    settings: Sequence[SAESettings],
    *,
    site: str | None = None,
    pooled_share: float = 0.0,
    pairs_p2d: Tensor | None = None,
    role_names: tuple[str, ...] = (),
    folder: Path | None = None,
    checkpoint_every: int = 1000,
    processes: Processes | None = None,
    progress: Progress = no_progress,
    watch: Watch | None = None,
) -> list[TrainedSAE]:
    """Train SAEs side by side on the same tokens.

    Args:
        source: where tokens come from (`StoreSource`, `LiveSource`).
        settings: one for each SAE; steps, batch size and the first seed are of all.
        site: of the activations, for settings that leave the input scale to it.
        pooled_share: share of a batch that tokens have which the readout's pooling reads.
        pairs_p2d: vectors of pairs (p, 2, d), for settings that share concepts.
        role_names: names of the roles that the source numbers, for figures per role.
        folder: where checkpoints are kept; a stopped training goes on from there and, on a CPU,
            ends with the same bits. None: no checkpoints.
        processes: several that train together, each on its share of every batch.

    Raises:
        UserError: an unknown architecture or option, or a checkpoint of other settings.
    """
    processes = processes or Processes()
    keep_freed_memory()
    common = settings[0]
    steps = common.steps or training_steps(source.n_tokens, common.batch_size)
    seed = common.seed or 0
    local_size = max(1, common.batch_size // processes.count)
    with ExitStack() as streams:
        stream = streams.enter_context(
            closing(batches(source, local_size, seed, None, pooled_share))
        )
        opening = list(islice(stream, 8))
        first_nd = torch.cat([x_nd for x_nd, _ in opening])
        settings = [s.resolved(site, first_nd.shape[1], steps) for s in settings]
        normalisations = {
            scale: Normalisation.of(first_nd, scale, processes)
            for scale in dict.fromkeys(s.scale_of_input for s in settings)
        }
        seen = {
            scale: normalise(first_nd[:local_size]).to(processes.device)
            for scale, normalise in normalisations.items()
        }
        learners = [_learner(s, seen[s.scale_of_input], processes) for s in settings]
        pairs = {
            scale: _Pairs(normalise(pairs_p2d), common, seed)
            for scale, normalise in normalisations.items()
            if pairs_p2d is not None
        }
        statistics = [[n.mean_d.tolist(), n.scale] for n in normalisations.values()]
        key = value_hash(
            [CHECKPOINT_FORMAT, [asdict(s) for s in settings], pooled_share, *statistics]
        )
        checkpoint = Checkpoint(folder, key, learners, processes)
        start, position, fvu = checkpoint.load()
        if start:  # what the stream has read ahead is of another place
            stream.close()
            there = batches(source, local_size, seed, position, pooled_share)
            stream, opening = streams.enter_context(closing(there)), []
        began, measured_from = time.monotonic(), start
        tokens = chain(opening, stream)
        for step in progress(range(start, steps), steps - start):
            x_nd, position = next(tokens)
            seen = {
                s: normalise(x_nd).to(processes.device) for s, normalise in normalisations.items()
            }
            losses = []
            for learner, own in zip(learners, settings, strict=True):
                x_nd = seen[own.scale_of_input]
                extra_qd = None
                if pairs and own.shared != "none":
                    extra_qd = pairs[own.scale_of_input].at(step)
                batch_nd = x_nd if extra_qd is None else torch.cat([x_nd, extra_qd.to(x_nd.device)])
                n_pairs = 0 if extra_qd is None else len(extra_qd) // 2
                lr = own.peak_lr(len(learner.weights.b_enc_c)) * _schedule(own.warmup, step, steps)
                losses.append(learner.step(batch_nd, lr, n_pairs))
            for i, loss in enumerate(losses):
                fvu[i] += max(0.02, 1 / (step + 1)) * (float(loss.fvu) - fvu[i])
            if watch is not None and ((step + 1) % 10 == 0 or step + 1 == steps):
                rate = (step + 1 - measured_from) * common.batch_size / (time.monotonic() - began)
                watch(_now(step + 1, rate, fvu, losses, learners))
            if (step + 1) % checkpoint_every == 0:
                checkpoint.save(step + 1, position, fvu)
    held_out_nd, roles_n = source.held_out(HELD_OUT_TOKENS)
    fitting, measuring = slice(0, None, 2), slice(1, None, 2)
    trained = []
    for learner, own in zip(learners, settings, strict=True):
        normalise = normalisations[own.scale_of_input]
        sae, conversion = convert(
            learner,
            normalise.mean_d,
            normalise.scale,
            held_out_nd[fitting],
            normalise.input_scale,
        )
        metrics = measure(sae, held_out_nd[measuring], roles_n[measuring], role_names)
        dead = float(learner.dead_c.float().mean())
        trained.append(TrainedSAE(sae, own, conversion, metrics, dead))
    return trained


def _schedule(warmup: int, step: int, steps: int) -> float:
    """Of the learning rate: linear warm-up; in the last fifth linearly down to zero."""
    return min(1.0, (step + 1) / warmup, 5 * (steps - step) / steps)


def _learner(settings: SAESettings, x_nd: Tensor, processes: Processes) -> Learner:
    """A new SAE; thresholds that are learned begin where BatchTopK would have its one."""
    d = x_nd.shape[1]
    architecture = make_architecture(settings.architecture, settings.k, **settings.options)
    c = settings.expansion * d
    if settings.k > c:
        raise UserError(f"k {settings.k}: there are {c} concepts only; lower k or raise expansion")
    generator = torch.Generator().manual_seed(settings.seed or 0)
    weights = Weights.random(d, c, generator).to(x_nd.device)
    weights.scale_encoder(x_nd, settings.k, processes.mean)
    if architecture.learns_threshold:
        pre_activations = PreActivations(x_nd, weights.W_enc_cd, weights.b_enc_c)
        entries = topk_of_batch(pre_activations, settings.k)
        u_e = sampled_products(x_nd, weights.W_enc_cd, entries.rows_e, entries.concepts_e)
        weights.threshold_c.fill_(float(processes.mean(u_e.min())))
    shared = None
    if settings.shared != "none":
        shared = SharedConcepts(settings.shared, settings.shared_weight)
    return Learner(
        weights,
        architecture,
        k_aux=settings.k_aux,
        aux_weight=settings.aux_weight,
        dead_after=-(-settings.dead_after_tokens // processes.count),
        low_precision=_low_precision(settings.precision, x_nd.device),
        shared=shared,
        reduce=processes.mean,
    )


def _low_precision(precision: str, device: torch.device) -> bool:
    """Whether to select by a bf16 product."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 or newer
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _now(
    step: int, rate: float, fvu: list[float], losses: list[Loss], learners: list[Learner]
) -> Now:
    return Now(
        step,
        rate,
        list(fvu),
        [float(loss.l0) for loss in losses],
        [float(learner.dead_c.float().mean()) for learner in learners],
    )


class _Pairs:
    """Which pairs a step sees: all of them in a new order again and again."""

    def __init__(self, pairs_p2d: Tensor, settings: SAESettings, seed: int) -> None:
        self.pairs_p2d, self.seed = pairs_p2d, seed
        self.size = min(settings.pairs_per_step, len(pairs_p2d))

    def at(self, step: int) -> Tensor:
        """The step's pairs, all first sides before all second sides, (2 pairs, d)."""
        per_epoch = len(self.pairs_p2d) // self.size
        generator = torch.Generator().manual_seed(self.seed + step // per_epoch)
        order = torch.randperm(len(self.pairs_p2d), generator=generator)
        first = step % per_epoch * self.size
        return self.pairs_p2d[order[first : first + self.size]].transpose(0, 1).flatten(0, 1)
