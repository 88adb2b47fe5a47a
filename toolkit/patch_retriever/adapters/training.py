"""The training of an adapter: pairs through the frozen patch, three losses, looks at validation."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patch_retriever.adapters.batches import Batch, Pairs
from patch_retriever.adapters.captions import Captions
from patch_retriever.adapters.checkpoint import AdapterCheckpoint
from patch_retriever.adapters.forward import PatchedForward, Pooled
from patch_retriever.adapters.looks import Look, Training, Watch
from patch_retriever.adapters.losses import contrastive, mean_shares, rebalancing
from patch_retriever.adapters.memory import out_of_memory_said
from patch_retriever.adapters.profile import profile
from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.adapters.targets import adapter_config
from patch_retriever.ahead import made_ahead
from patch_retriever.backbones.adapter import unload
from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.inputs import on_device, twin
from patch_retriever.backbones.placement import device_of
from patch_retriever.items import Item
from patch_retriever.patch.artefact import DOCUMENT, QUERY
from patch_retriever.progress import Progress, no_progress
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import evaluate_embeddings

if TYPE_CHECKING:
    from peft import PeftModel

CLIP = 1.0
"""Largest norm of a step's gradient."""


class AdapterTrainer:
    """An adapter in training inside a backbone. Its weights are the only ones that change."""

    def __init__(
        self,
        forward: PatchedForward,
        training: Collection,
        validation: Collection,
        captions: Sequence[tuple[Item, str]],
        settings: AdapterSettings,
        seed: int,
        batch_size: int = 64,
        progress: Progress = no_progress,
    ) -> None:
        """Measures the unadapted model on `training`, then puts an adapter that does nothing yet
        into the backbone; `close` takes it out. `batch_size` is of passes without gradients.

        Raises:
            UserError: no target module was found, or there is nothing to train on.
        """
        from peft import get_peft_model

        self.forward, self.settings, self.validation = forward, settings, validation
        self._batch_size, self._progress = batch_size, progress
        self._items = training.items
        self.pairs = Pairs(training, settings.batch_size, seed)
        self.profile = profile(forward, training.items, batch_size, progress)
        if settings.hard_negatives:
            self.pairs.mine(self.profile.as_query_ne, self.profile.as_document_ne)
        transformer = forward.transformer
        self._captions = Captions(transformer, captions) if settings.retention else None
        if self._captions is not None and not len(self._captions):
            self._captions = None
        torch.manual_seed(seed)
        model: Any = transformer.model
        config = adapter_config(model, settings)
        with warnings.catch_warnings():  # peft asks in a way that transformers deprecates
            warnings.simplefilter("ignore", FutureWarning)
            self.peft_model: PeftModel = get_peft_model(model, config)
        self.parameters = {n: p for n, p in self.peft_model.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(self.parameters.values(), settings.lr, weight_decay=0.0)

    def train(
        self, checkpoint: AdapterCheckpoint | None = None, watch: Watch | None = None
    ) -> Training:
        """Train until the steps are done or validation has not risen for `patience` looks. The
        adapter then has its last weights; `keep` gives it those of the best look, which may be the
        ones that it began with.

        Raises:
            UserError: memory ran out, or a picture cannot be read.
        """
        settings = self.settings
        state = checkpoint.load(self.parameters, self.optimiser) if checkpoint is not None else None
        looks, best, best_weights = state or ([self._look(0, {}, 0.0)], 0, self._weights())
        if state is None and watch is not None:
            watch(looks[0])
        done, before = looks[-1].step, looks[-1].seconds
        started = time.monotonic()
        sums: dict[str, float] = {}
        ended = len(looks) - 1 - best >= settings.patience
        last = done if ended else settings.steps
        numbers = range(done * settings.accumulate, last * settings.accumulate)
        prepare = partial(self._prepared, twin(self.forward.transformer))
        with (
            self._in_training(),
            out_of_memory_said(settings),
            closing(made_ahead(prepare, numbers)) as batches,
        ):
            drawn = self._progress(batches, len(numbers))
            for number, (batch, chunks) in zip(numbers, drawn, strict=False):
                step, place = divmod(number, settings.accumulate)
                for name, value in self.backward(number, batch, chunks).items():
                    sums[name] = sums.get(name, 0.0) + value
                if place + 1 < settings.accumulate:
                    continue
                self._step(step)
                if (step + 1) % settings.validate_every and step + 1 != settings.steps:
                    continue
                n = (step + 1 - looks[-1].step) * settings.accumulate
                means = {name: value / n for name, value in sums.items()}
                sums = {}
                looks.append(self._look(step + 1, means, before + time.monotonic() - started))
                if looks[-1].validation_score > looks[best].validation_score:
                    best, best_weights = len(looks) - 1, self._weights()
                if checkpoint is not None:
                    checkpoint.save(self.parameters, self.optimiser, looks, best, best_weights)
                if watch is not None:
                    watch(looks[-1])
                if len(looks) - 1 - best >= settings.patience:
                    break
        n_parameters = sum(p.numel() for p in self.parameters.values())
        return Training(tuple(looks), best, best_weights, n_parameters, len(self.pairs))

    def close(self) -> None:
        """Take the adapter out: the backbone is as it was before."""
        unload(self.peft_model)
        self.forward.transformer.model.requires_grad_(False)

    def backward(
        self, number: int, batch: Batch, chunks: Sequence[tuple[list[int], dict[str, Any]]]
    ) -> dict[str, float]:
        """Add the gradients of batch `number`, a share of a step's, to those that are there.

        `chunks` are the batch's items, (places, preprocessed features). Several are passed twice:
        once without gradients, for those of the contrastive loss in the pooled vectors, then each
        by itself with them (GradCache, arXiv 2101.06983). Gradients are those of one large pass.
        """
        settings, share = self.settings, 1 / self.settings.accumulate
        device = device_of(self.forward.transformer)
        m = len(batch.items_m)
        once = len(chunks) == 1 or not settings.contrastive
        found: dict[str, float] = {}
        gradient_md = None
        if not once:
            with torch.no_grad():
                parts = [self.forward.pooled(on_device(f, device), False) for _, f in chunks]
            pooled = _joined(parts, [rows for rows, _ in chunks])
            pooled.x_nd.requires_grad_()
            loss = self._contrastive(pooled, batch)
            (gradient_md,) = torch.autograd.grad(settings.contrastive * share * loss, pooled.x_nd)
            found["contrastive"] = float(loss.detach())
        energies: list[Tensor] = []
        for rows, features in chunks:
            pooled = self.forward.pooled(on_device(features, device), bool(settings.rebalancing))
            terms: list[Tensor] = []
            if gradient_md is not None:
                terms.append((pooled.x_nd * gradient_md[rows]).sum())
            elif settings.contrastive:
                loss = self._contrastive(_joined([pooled], [rows]), batch)
                terms.append(settings.contrastive * share * loss)
                found["contrastive"] = float(loss.detach())
            if settings.rebalancing and self.profile.energy_n3 is not None:
                assert pooled.energy_ng is not None
                before_n3 = self.profile.energy_n3[batch.items_m[rows]].to(device)
                loss = rebalancing(pooled.energy_ng, before_n3, settings.shift) * len(rows) / m
                terms.append(settings.rebalancing * share * loss)
                found["rebalancing"] = found.get("rebalancing", 0.0) + float(loss.detach())
                energies.append(pooled.energy_ng.detach())
            torch.stack(terms).sum().backward()
        if energies:
            found["up_share"], found["down_share"] = mean_shares(torch.cat(energies))
        if self._captions is not None:
            n, each = len(self._captions), settings.captions_per_step
            loss = self._captions.loss([(number * each + i) % n for i in range(min(n, each))])
            (settings.retention * share * loss).backward()
            found["retention"] = float(loss.detach())
        return found

    def _contrastive(self, pooled: Pooled, batch: Batch) -> Tensor:
        device = pooled.x_nd.device
        # index_select: the backward pass of plain indexing adds in no fixed order on many threads
        queries_qe, documents_de = (
            self.forward.embed(pooled, role).index_select(0, places.to(device))
            for role, places in ((QUERY, batch.queries_q), (DOCUMENT, batch.documents_d))
        )
        relevant_qd = batch.relevant_qd.to(device)
        return contrastive(queries_qe, documents_de, relevant_qd, self.settings.temperature)

    def _prepared(
        self, transformer: Any, number: int
    ) -> tuple[Batch, list[tuple[list[int], dict[str, Any]]]]:
        """A batch and its items' inputs in chunks of alike lengths, by a processor of its own."""
        batch = self.pairs.batch(number, self.settings.hard_negatives)
        items = [self._items[int(i)] for i in batch.items_m]
        order = sorted(
            range(len(items)), key=lambda n: (items[n].kind, len(items[n].text or ""), n)
        )
        size = self.settings.chunk_size
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        return batch, [(c, transformer.preprocess([items[n].load() for n in c])) for c in chunks]

    def _step(self, step: int) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * _rate(step, self.settings.warmup, self.settings.steps)
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def _look(self, step: int, means: dict[str, float], seconds: float) -> Look:
        seen = profile(self.forward, self.validation.items, self._batch_size, energies=False)
        outcome = evaluate_embeddings(
            seen.as_query_ne.numpy(), seen.as_document_ne.numpy(), self.validation
        )
        names = [f.name for f in fields(Look) if f.name not in ("step", "seconds")]
        values = {name: means.get(name, 0.0) for name in names}
        if step == 0 and self.profile.energy_n3 is not None:
            values["up_share"], values["down_share"] = mean_shares(self.profile.energy_n3)
        r1 = sum(outcome.recalls(task.name)[0] for task in self.validation.tasks)
        values |= {
            "validation_score": outcome.score,
            "validation_r1": r1 / len(self.validation.tasks),
        }
        return Look(step=step, seconds=seconds, **values)

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def keep(self, weights: dict[str, Tensor]) -> None:
        """Give the adapter these weights."""
        with torch.no_grad():
            for name, values in weights.items():
                self.parameters[name].copy_(values)

    @contextmanager
    def _in_training(self) -> Generator[None]:
        """No cache of keys and values, and checkpointing where it is asked for. The modules stay
        in evaluation mode: a backbone's dropout would make the two passes of a batch differ."""
        model: Any = self.forward.transformer.model
        text = model.config.get_text_config()
        use_cache = getattr(text, "use_cache", None)
        if use_cache is not None:
            text.use_cache = False
        layers: Any = model.get_submodule(layers_path(model))
        if self.settings.gradient_checkpointing:
            with warnings.catch_warnings():  # its new name is not in all versions
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in layers:
                layer.training = True  # what a layer asks before it checkpoints; not its parts
        try:
            yield
        finally:
            if use_cache is not None:
                text.use_cache = use_cache
            if self.settings.gradient_checkpointing:
                model.gradient_checkpointing_disable()
                for layer in layers:
                    layer.training = False


def _joined(parts: Sequence[Pooled], rows: Sequence[list[int]]) -> Pooled:
    """Chunks of a batch as one, in the order of its items."""
    device = parts[0].x_nd.device
    place = torch.tensor([row for part in rows for row in part], device=device).argsort()
    x_nd, mean_nd = (
        torch.cat([getattr(part, name) for part in parts]).index_select(0, place)
        for name in ("x_nd", "mean_nd")
    )
    return Pooled(x_nd, mean_nd)


def _rate(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate at a step: up in a line, down along a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
