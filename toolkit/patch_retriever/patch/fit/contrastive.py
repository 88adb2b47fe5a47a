"""An alignment that goes on where a closed form ends: by a contrastive loss over whole tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from patch_retriever.patch.operators import Affine
from patch_retriever.sae.codes import Codes


@dataclass(frozen=True)
class GradedTask:
    """A retrieval task over numbered items: `relevant_e[starts_q1[q] : starts_q1[q + 1]]` are the
    places in `documents_n` that answer the item `queries_q[q]`."""

    queries_q: Tensor
    documents_n: Tensor
    starts_q1: Tensor
    relevant_e: Tensor

    @classmethod
    def of(
        cls, queries: Sequence[int], documents: Sequence[int], relevant: Sequence[Sequence[int]]
    ) -> GradedTask:
        """From lists."""
        sizes = torch.tensor([0, *map(len, relevant)])
        flat = [place for places in relevant for place in places]
        return cls(
            torch.tensor(queries), torch.tensor(documents), sizes.cumsum(0), torch.tensor(flat)
        )

    def batch(
        self, queries: int, documents: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Items (q,) of some queries, items (m,) of some documents, those relevant to the queries
        among them, and which are relevant to which (q, m)."""
        picks_q = torch.randperm(len(self.queries_q), generator=generator)[:queries]
        starts_q, ends_q = self.starts_q1[picks_q], self.starts_q1[picks_q + 1]
        rows_e = torch.arange(len(picks_q)).repeat_interleave(ends_q - starts_q)
        shift_q = starts_q - torch.cat([starts_q.new_zeros(1), (ends_q - starts_q).cumsum(0)[:-1]])
        places_e = self.relevant_e[torch.arange(len(rows_e)) + shift_q[rows_e]]
        n = len(self.documents_n)
        chosen_n = torch.zeros(n, dtype=torch.bool)
        chosen_n[places_e] = True
        if n <= documents:
            chosen_n[:] = True
        else:
            chosen_n[torch.randperm(n, generator=generator)[:documents]] = True
        places_m = chosen_n.nonzero()[:, 0]
        column_n = chosen_n.cumsum(0) - 1
        relevant_qm = torch.zeros(len(picks_q), len(places_m), dtype=torch.bool)
        relevant_qm[rows_e, column_n[places_e]] = True
        return self.queries_q[picks_q], self.documents_n[places_m], relevant_qm


@dataclass(frozen=True)
class ConceptCodes:
    """The items' pooled codes, and what every concept adds to the first d entries of the vectors
    that are aligned: a row of `dictionary_cd` for a concept."""

    codes: Codes
    dictionary_cd: Tensor

    def to(self, device: str) -> ConceptCodes:
        """The same on a device."""
        return ConceptCodes(self.codes.to(device), self.dictionary_cd.to(device))


@dataclass(frozen=True)
class ContrastiveSettings:
    """How the alignment is learned."""

    steps: int = 200
    lr: float = 0.03
    """Of Adam, in units of the root mean square of the map's weights; falls linearly to zero."""
    temperature: float = 0.1
    queries: int = 512
    documents: int = 4096
    """In a step, beside those that are relevant to its queries."""
    strength_lr: float = 0.03
    """Of the concepts' strengths, where they are learned too."""


def contrastive(
    x_nd: Tensor,
    kinds_n: Tensor,
    start: Affine,
    tasks: Sequence[GradedTask],
    settings: ContrastiveSettings,
    seed: int,
    concepts: ConceptCodes | None = None,
    device: str = "cpu",
) -> tuple[Affine, Tensor | None]:
    """`start`, an affine map for each kind, changed so that every task's queries are nearer to
    what is relevant to them than to its other documents; with `concepts` also how much of each to
    subtract before it, (c,) in [-1, 1]: below zero there is more of it.

    Steps take the tasks in turn. The loss of a query is - log of the share of relevant documents
    in the softmax of all cosines over the temperature (InfoNCE with several positives); the query's
    own item counts only where it is relevant. No weight of a model changes, so that a step costs a
    few products.
    """
    generator = torch.Generator().manual_seed(seed)
    x_nd, kinds_n, start = x_nd.to(device), kinds_n.to(device), start.to(device)
    concepts = None if concepts is None else concepts.to(device)
    scale_g11 = start.weight_gde.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
    weight_gde = torch.zeros_like(start.weight_gde, requires_grad=True)
    bias_ge = torch.zeros_like(start.bias_ge, requires_grad=True)
    rates = [([weight_gde, bias_ge], settings.lr)]
    strength_c = None
    if concepts is not None:
        strength_c = x_nd.new_zeros(len(concepts.dictionary_cd), requires_grad=True)
        rates.append(([strength_c], settings.strength_lr))
    optimizer = torch.optim.Adam([{"params": params, "lr": lr} for params, lr in rates])

    def current() -> Affine:
        return replace(
            start,
            name="contrastive",
            weight_gde=start.weight_gde + scale_g11 * weight_gde,
            bias_ge=start.bias_ge + scale_g11[:, 0] * bias_ge,
        )

    def embedded(items_m: Tensor) -> Tensor:
        x_md = x_nd[items_m]
        if concepts is not None and strength_c is not None:
            codes, strength = concepts.codes[items_m], strength_c.clamp(-1, 1)
            removed_md = codes.weighted_matmul(strength, concepts.dictionary_cd)
            x_md = x_md - pad(removed_md, (0, x_md.shape[1] - removed_md.shape[1]))
        return normalize(current().by_kind(x_md, kinds_n[items_m]), dim=1)

    for step in range(settings.steps):
        task = tasks[step % len(tasks)]
        queries_q, documents_m, relevant_qm = (
            tensor.to(device)
            for tensor in task.batch(settings.queries, settings.documents, generator)
        )
        scores_qm = embedded(queries_q) @ embedded(documents_m).T / settings.temperature
        itself_qm = (queries_q[:, None] == documents_m[None, :]) & ~relevant_qm
        scores_qm = scores_qm.masked_fill(itself_qm, -torch.inf)
        found_q = scores_qm.masked_fill(~relevant_qm, -torch.inf).logsumexp(1)
        loss = (scores_qm.logsumexp(1) - found_q).mean()
        for group, (_, lr) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - step / settings.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        aligned = current().to("cpu")
    return aligned, None if strength_c is None else strength_c.detach().clamp(-1, 1).cpu()
