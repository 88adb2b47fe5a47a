"""One SAE trainer in one process: reads requests as JSON lines, answers each with one.

`sae_training.py` starts a worker per row of its table, in the environment of that row's package.
Every class here is one trainer: its docstring says what a step holds, `step` does one as the
package's own loop does it, `reconstruct` is the package's own forward pass. Only what they import
differs, so this file runs where nothing but torch, numpy and that one package is installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

NEVER = 10**9
"""More tokens than any run here has, for schedules that end with the training."""


@dataclass(frozen=True)
class Settings:
    """What all trainers share."""

    d: int
    c: int
    k: int
    batch: int
    lr: float
    seed: int


class Trainer:
    """What a worker asks of a trainer."""

    distribution = "torch"
    """Whose version stands in the table."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        raise NotImplementedError

    def step(self, x_nd: Tensor) -> None:
        """One whole step of training."""
        raise NotImplementedError

    def reconstruct(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions (n, d), and which concepts are active (n, c)."""
        raise NotImplementedError


class Ours(Trainer):
    """Sparse gradients, fused Adam and unit rows (every 8th step) in one pass; the product that
    selects in bfloat16 unless the row says float32; AuxK for concepts silent for 60 steps; glibc
    told to keep freed memory. No clipping."""

    distribution = "patch-retriever"

    def __init__(self, settings: Settings, bfloat16: bool = True) -> None:
        from patch_retriever.sae.learner import Learner, Weights
        from patch_retriever.sae.memory import keep_freed_memory

        keep_freed_memory()
        generator = torch.Generator().manual_seed(settings.seed)
        self.weights = Weights.random(settings.d, settings.c, generator)
        self.settings, self.bfloat16 = settings, bfloat16
        self.learner: Learner | None = None

    def step(self, x_nd: Tensor) -> None:
        """`Learner.step`, as the training loop calls it."""
        from patch_retriever.sae.architectures import make_architecture
        from patch_retriever.sae.learner import Learner

        if self.learner is None:
            self.weights.scale_encoder(x_nd, self.settings.k)
            architecture = make_architecture("topk", self.settings.k)
            self.learner = Learner(self.weights, architecture, low_precision=self.bfloat16)
        self.learner.step(x_nd, self.settings.lr)

    def reconstruct(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """The learner's own selection; activations and sum in float32."""
        assert self.learner
        weights, entries = self.weights, self.learner.select(x_nd)
        u_nc = torch.addmm(weights.b_enc_c, x_nd, weights.W_enc_cd.T)
        codes_nc = torch.zeros_like(u_nc)
        where = (entries.rows_e, entries.concepts_e)
        codes_nc[where] = u_nc[where].relu()
        return torch.addmm(weights.b_dec_d, codes_nc, weights.W_dec_cd), codes_nc > 0


class Floor(Trainer):
    """No training: the encoder's product (torch.mm) and torch.topk, into memory that stays."""

    def __init__(self, settings: Settings, bfloat16: bool = False) -> None:
        self.dtype, self.k = torch.bfloat16 if bfloat16 else torch.float32, settings.k
        rows_cd = torch.randn(settings.c, settings.d) / settings.d**0.5
        self.W_dc = rows_cd.to(self.dtype).T
        self.u_nc = torch.empty(settings.batch, settings.c, dtype=self.dtype)
        self.values_nk = torch.empty(settings.batch, settings.k, dtype=self.dtype)
        self.indices_nk = torch.empty(settings.batch, settings.k, dtype=torch.long)

    def step(self, x_nd: Tensor) -> None:
        """What no exact TopK step can do without."""
        torch.mm(x_nd.to(self.dtype), self.W_dc, out=self.u_nc)
        torch.topk(self.u_nc, self.k, sorted=False, out=(self.values_nk, self.indices_nk))


class Sparsify(Trainer):
    """FusedEncoder and embedding_bag; torch.optim.Adam as its trainer makes it (not fused unless
    the row says so); every step unit decoder rows before and the parallel part of their gradient
    removed after; matmul precision "high"; counts of silence, no AuxK (its default auxk_alpha is
    0), no clipping. Its own bfloat16 autocast names CUDA; the row with autocast has the same for
    the CPU around the forward pass."""

    distribution = "eai-sparsify"

    def __init__(self, settings: Settings, autocast: bool = False, fused: bool = False) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        torch.set_float32_matmul_precision("high")  # Trainer.fit
        config = SparseCoderConfig(num_latents=settings.c, k=settings.k)
        self.sae = SparseCoder(settings.d, config, dtype=torch.float32)
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=settings.lr, fused=True if fused else None
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda _: 1.0)
        self.autocast = autocast
        self.silent_c = torch.zeros(settings.c, dtype=torch.long)
        self.fired_c = torch.zeros(settings.c, dtype=torch.bool)
        self.steps, self.fvu = 0, 0.0

    def _forward(self, x_nd: Tensor, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            return self.sae(x_nd, **options)

    def step(self, x_nd: Tensor) -> None:
        """The hook and the loop of `Trainer.fit` for one hookpoint, without the model."""
        sae = self.sae
        if self.steps == 0:
            sae.b_dec.data = x_nd.mean(0)
        self.steps += 1
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x_nd - x_nd.mean(0)).pow(2).sum()
        out = self._forward(x_nd, y=x_nd, dead_mask=None, total_variance=total_variance)
        self.fired_c[out.latent_indices.flatten()] = True
        self.fvu = float(out.fvu.detach())
        loss = out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8
        loss.div(1).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        with torch.no_grad():
            self.silent_c += len(x_nd)
            self.silent_c[self.fired_c] = 0
            self.fired_c.zero_()

    def reconstruct(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """`SparseCoder.forward`."""
        out = self._forward(x_nd)
        active_nc = torch.zeros(len(x_nd), self.sae.num_latents, dtype=torch.bool)
        return out.sae_out, active_nc.scatter_(1, out.latent_indices, out.latent_acts > 0)


class SAELens(Trainer):
    """SAETrainer.step: dense autograd, selection by pre-activation times decoder norm in place of
    unit rows, gradients clipped to norm 1, torch.optim.Adam (its default loop over tensors), firing
    statistics, AuxK after 1000 steps of silence. Decoder rows begin at norm 0.1. The sparse row
    (use_sparse_activations) goes without decoder norms: with them its backward pass fails on a
    CPU."""

    distribution = "sae-lens"

    def __init__(
        self, settings: Settings, autocast: bool = False, sparse_activations: bool = False
    ) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        config = TopKTrainingSAEConfig(
            d_in=settings.d,
            d_sae=settings.c,
            k=settings.k,
            use_sparse_activations=sparse_activations,
            rescale_acts_by_decoder_norm=not sparse_activations,
        )
        training = SAETrainerConfig(
            total_training_samples=NEVER,
            train_batch_size_samples=settings.batch,
            lr=settings.lr,
            lr_end=settings.lr,  # its runner's config sets this; a constant schedule ignores it
            autocast=autocast,
        )
        self.trainer = SAETrainer(training, TopKTrainingSAE(config), data_provider=iter(()))

    def step(self, x_nd: Tensor) -> None:
        """The body of the loop of `SAETrainer.fit` that isn't logging or checkpoints."""
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x_nd)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` and `decode` of the training SAE."""
        codes_nc = self.trainer.sae.encode(x_nd)
        reconstructed_nd = self.trainer.sae.decode(codes_nc)
        return reconstructed_nd, codes_nc.to_dense() > 0


class DictionaryLearning(Trainer):
    """TopKTrainer.update: dense autograd, decoder bias from the geometric median (first step), the
    part of the decoder's gradient along its columns removed, gradients clipped to norm 1,
    torch.optim.Adam (its default loop over tensors), unit columns after every step, AuxK after 10
    million tokens of silence. Without its 1000 steps of warm-up: the rate is constant for all."""

    distribution = "dictionary-learning"

    def __init__(self, settings: Settings) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer = TopKTrainer(
            steps=NEVER,
            activation_dim=settings.d,
            dict_size=settings.c,
            k=settings.k,
            layer=0,
            lm_name="none",
            lr=settings.lr,
            warmup_steps=0,
            seed=settings.seed,
            device="cpu",
        )
        self.steps = 0

    def step(self, x_nd: Tensor) -> None:
        """What `trainSAE` calls."""
        self.trainer.update(self.steps, x_nd)
        self.steps += 1

    def reconstruct(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` with TopK, and `decode`."""
        codes_nc = self.trainer.ae.encode(x_nd)
        return self.trainer.ae.decode(codes_nc), codes_nc > 0


class Overcomplete(Trainer):
    """train_sae, one batch a call: dense autograd, unit rows in every forward pass, the README's
    criterion (mean squared error) and torch.optim.Adam (its default loop over tensors), gradients
    clipped to norm 1, its default monitoring (R2, L0); a tracker of dead codes, nothing revived."""

    distribution = "overcomplete"

    def __init__(self, settings: Settings) -> None:
        # the package's root imports plotting and model loaders that SAEs don't need, and that
        # fail with a current matplotlib or with a torchvision of another build
        spec = PathFinder.find_spec("overcomplete")
        if spec is None:
            raise ModuleNotFoundError("No module named 'overcomplete'")
        package = sys.modules.setdefault("overcomplete", ModuleType("overcomplete"))
        package.__path__ = list(spec.submodule_search_locations or [])
        from overcomplete.sae import TopKSAE, train_sae

        self.sae = TopKSAE(settings.d, nb_concepts=settings.c, top_k=settings.k)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=settings.lr)
        self.train_sae = train_sae

    def step(self, x_nd: Tensor) -> None:
        """An epoch of one batch."""
        self.train_sae(self.sae, [x_nd], _mean_squared_error, self.optimiser, nb_epochs=1)

    def reconstruct(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """`TopKSAE.forward` in evaluation mode."""
        self.sae.eval()
        _, codes_nc, reconstructed_nd = self.sae(x_nd)
        return reconstructed_nd, codes_nc > 0


def _mean_squared_error(x_nd: Tensor, x_hat_nd: Tensor, *_: Tensor) -> Tensor:
    return (x_nd - x_hat_nd).square().mean()


TRAINERS: dict[str, type[Trainer]] = {
    "ours": Ours,
    "floor": Floor,
    "sparsify": Sparsify,
    "saelens": SAELens,
    "dictlearn": DictionaryLearning,
    "overcomplete": Overcomplete,
}


@dataclass(frozen=True)
class Tokens:
    """Activations in a file of float16, read a part at a time so that no worker holds them all."""

    path: Path
    d: int

    def rows(self, first: int, n: int) -> Tensor:
        """These rows, float32 (n, d)."""
        values = np.fromfile(self.path, np.float16, n * self.d, offset=2 * self.d * first)
        return torch.from_numpy(values.astype(np.float32)).view(n, self.d)


class Worker:
    """Answers the requests of `sae_training.py`; a method each."""

    def __init__(self, name: str) -> None:
        self.kind = TRAINERS[name]
        self.done = 0

    def build(
        self, settings: dict[str, Any], options: dict[str, Any], threads: int, path: str, n: int
    ) -> dict[str, Any]:
        """Make the trainer; `n` training tokens stand at the beginning of the file."""
        self.settings = Settings(**settings)
        self.tokens, self.n_training = Tokens(Path(path), self.settings.d), n
        torch.set_num_threads(threads)
        torch.manual_seed(self.settings.seed)
        # once with small weights and without time limits: what a package imports on the way
        # counts neither as memory nor as time of its training
        small = Settings(16, 64, 2, 8, self.settings.lr, 0)
        self.kind(small, **options).step(torch.randn(8, 16))
        torch.manual_seed(self.settings.seed)
        before = _start_memory()
        self.trainer = self.kind(self.settings, **options)
        return {"before_bytes": before, "version": _version(self.kind.distribution)}

    def steps(self, n: int) -> dict[str, Any]:
        """The next steps, and how long each took; reading the batch isn't timed."""
        seconds, size = [], self.settings.batch
        for _ in range(n):
            x_nd = self.tokens.rows(self.done * size % self.n_training, size)
            start = time.perf_counter()
            self.trainer.step(x_nd)
            seconds.append(time.perf_counter() - start)
            self.done += 1
        return {"seconds": seconds, "peak_bytes": _memory("VmHWM")}

    @torch.no_grad()
    def evaluate(self, n: int) -> dict[str, Any]:
        """On the `n` held-out tokens: FVU, share of concepts that never fire, active per token."""
        x_nd = self.tokens.rows(self.n_training, n)
        error, active, fired_c = 0.0, 0, torch.zeros(self.settings.c, dtype=torch.bool)
        for x_md in x_nd.split(self.settings.batch):
            reconstructed_md, active_mc = self.trainer.reconstruct(x_md)
            error += float((reconstructed_md - x_md).square().sum())
            active += int(active_mc.sum())
            fired_c |= active_mc.any(0)
        variance = float((x_nd - x_nd.mean(0)).square().sum())
        dead = 1 - float(fired_c.float().mean())
        return {"fvu": error / variance, "dead_share": dead, "l0": active / n}


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:  # on PYTHONPATH, not installed
        return "from source"


def _memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _start_memory() -> int:
    """Bytes in use now; the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    return _memory("VmRSS")


def serve(worker: Worker, requests: IO[str], answers: IO[str]) -> None:
    """Until the requests end, or one fails: its error is the last answer."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error).split("\n")[0] or where.line
            answer = {"error": f"{type(error).__name__}: {said}"[:200]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            raise SystemExit(1)


if __name__ == "__main__":
    # packages print; the answers get standard output to themselves
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Worker(sys.argv[1]), sys.stdin, answers)
