"""Training: TopK with revival of dead concepts, then one threshold per concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from patch_retriever.activations.store import Store
from patch_retriever.progress import Progress, no_progress
from patch_retriever.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class SAESettings:
    """How an SAE is trained."""

    __pydantic_config__: ClassVar = {
        "extra": "forbid"
    }  # an unknown key in a config file is an error

    expansion: Annotated[int, Field(ge=1)] = 8
    """Concepts per dimension of the activations."""
    k: Annotated[int, Field(ge=1)] = 24
    """Active concepts per token."""
    steps: Annotated[int, Field(ge=1)] = 600
    batch_size: Annotated[int, Field(ge=1)] = 1024
    """Tokens per step."""
    lr: float = 2e-3
    dead_after: int = 60
    """Steps without firing after which a concept is dead and trained on what is left over."""
    k_aux: int = 64
    """Dead concepts that reconstruct the error of each token (AuxK, Gao et al. 2024)."""
    aux_weight: float = 1 / 32


class _TopK(nn.Module):
    """The autoencoder while it trains: on normalised activations, with a TopK gate."""

    def __init__(self, d: int, c: int, generator: torch.Generator) -> None:
        super().__init__()
        rows_cd = torch.randn(c, d, generator=generator)
        rows_cd = rows_cd / rows_cd.norm(dim=1, keepdim=True)
        self.W_dec_cd = nn.Parameter(rows_cd)
        self.W_enc_dc = nn.Parameter(rows_cd.T.clone())
        self.b_enc_c = nn.Parameter(torch.zeros(c))
        self.b_dec_d = nn.Parameter(torch.zeros(d))

    def pre_activations(self, x_nd: Tensor) -> Tensor:
        """Before the gate, (n, c)."""
        return (x_nd - self.b_dec_d) @ self.W_enc_dc + self.b_enc_c

    def decode(self, concepts_nk: Tensor, values_nk: Tensor) -> Tensor:
        """Sum of the chosen rows, (n, d), without a dense code."""
        return nn.functional.embedding_bag(
            concepts_nk, self.W_dec_cd, per_sample_weights=values_nk, mode="sum"
        )

    @torch.no_grad()
    def unit_rows(self) -> None:
        """Keep every concept's direction at length one."""
        self.W_dec_cd.div_(self.W_dec_cd.norm(dim=1, keepdim=True))


def train_sae(
    store: Store,
    settings: SAESettings,
    seed: int,
    pooled_share: float = 0.0,
    progress: Progress = no_progress,
) -> tuple[SparseAutoencoder, dict[str, float]]:
    """Train on a store; returns the SAE (JumpReLU, raw activations) and figures about it.

    The loss is the squared error per unit of variance plus AuxK (Gao et al. 2024, arXiv
    2406.04093). Then each concept gets the threshold at which it fires as often as the TopK gate
    chose it.
    """
    batches = store.training_batches(settings.batch_size, seed, pooled_share)
    first_nd = torch.cat([next(batches) for _ in range(8)])
    mean_d = first_nd.mean(0)
    scale = float((first_nd - mean_d).pow(2).sum(1).mean().sqrt())
    d = first_nd.shape[1]
    model = _TopK(d, settings.expansion * d, torch.Generator().manual_seed(seed))
    optimiser = torch.optim.Adam(model.parameters(), settings.lr, betas=(0.9, 0.999), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / 20, 5 * (settings.steps - s) / settings.steps)
    )
    silent_c = torch.zeros(settings.expansion * d, dtype=torch.long)
    fvu = 1.0
    for _ in progress(range(settings.steps), settings.steps):
        x_nd = (next(batches) - mean_d) / scale
        loss, error, fired_c = _loss(model, x_nd, silent_c >= settings.dead_after, settings)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        model.unit_rows()
        silent_c = torch.where(fired_c, 0, silent_c + 1)
        fvu += 0.02 * (float(error) - fvu)
    dead = int((silent_c >= settings.dead_after).sum())
    sae = _fold(model, mean_d, scale, batches, settings)
    figures = {"fvu_topk": fvu, "dead": dead, **_figures(sae, batches)}
    return sae, figures


def _loss(
    model: _TopK, x_nd: Tensor, dead_c: Tensor, settings: SAESettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Training loss, fraction of variance unexplained, and which concepts fired."""
    u_nc = model.pre_activations(x_nd)
    values_nk, concepts_nk = u_nc.topk(settings.k, dim=1)
    residual_nd = x_nd - model.b_dec_d - model.decode(concepts_nk, values_nk.relu())
    variance = (x_nd - x_nd.mean(0)).pow(2).sum()
    error = residual_nd.pow(2).sum() / variance
    loss = error
    n_dead = int(dead_c.sum())
    if n_dead:
        k = min(settings.k_aux, n_dead)
        aux_nk, rows_nk = u_nc.masked_fill(~dead_c, -torch.inf).topk(k, dim=1)
        target_nd = residual_nd.detach()
        left_nd = target_nd - model.decode(rows_nk, aux_nk.relu())
        aux = left_nd.pow(2).sum() / target_nd.pow(2).sum()
        loss = loss + settings.aux_weight * aux
    fired_c = torch.zeros_like(dead_c)
    fired_c[concepts_nk[values_nk > 0]] = True
    return loss, error.detach(), fired_c


@torch.no_grad()
def _fold(
    model: _TopK, mean_d: Tensor, scale: float, batches: Iterator[Tensor], settings: SAESettings
) -> SparseAutoencoder:
    """The trained model on raw activations, with each concept's threshold."""
    W_enc_dc = model.W_enc_dc.detach()
    b_enc_c = model.b_enc_c - (model.b_dec_d + mean_d / scale) @ W_enc_dc
    b_dec_d = mean_d + scale * model.b_dec_d
    u_nc = torch.cat([next(batches) @ W_enc_dc + scale * b_enc_c for _ in range(16)])
    values_nk, concepts_nk = u_nc.topk(settings.k, dim=1)
    counts_c = torch.bincount(concepts_nk[values_nk > 0], minlength=u_nc.shape[1])
    ranked_nc = u_nc.sort(dim=0, descending=True).values
    # halfway between the last activation that counts and the first that does not
    last_c = ranked_nc.gather(0, (counts_c - 1).clamp(min=0)[None])[0]
    next_c = ranked_nc.gather(0, counts_c.clamp(max=len(u_nc) - 1)[None])[0]
    threshold_c = torch.where(counts_c > 0, (last_c + next_c) / 2, ranked_nc[0] * 1.01).clamp(
        min=1e-6
    )
    return SparseAutoencoder(
        W_enc_dc, scale * b_enc_c, model.W_dec_cd.detach(), b_dec_d, threshold_c
    )


@torch.no_grad()
def _figures(sae: SparseAutoencoder, batches: Iterator[Tensor]) -> dict[str, float]:
    """FVU and active concepts per token with thresholds, on fresh batches."""
    x_nd = torch.cat([next(batches) for _ in range(8)])
    codes_nc = sae.encode(x_nd)
    error = (x_nd - sae.decode(codes_nc)).pow(2).sum() / (x_nd - x_nd.mean(0)).pow(2).sum()
    return {"fvu": float(error), "active": float((codes_nc > 0).sum(1).float().mean())}
