"""What an adapter is trained for: three losses, each with its formula and its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.concepts.selection import TEXT_DOMINANT
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.sae.model import CHUNK_CODES, SparseAutoencoder

TOTAL, UP, DOWN = 0, 1, 2
"""Groups of `ConceptGroups.energy`, as columns."""


def contrastive(
    queries_qe: Tensor, documents_de: Tensor, relevant_qd: Tensor, temperature: float
) -> Tensor:
    """Symmetric InfoNCE (arXiv 1807.03748) between each query and the document of its number.

    L = (1 / 2q) sum_n [ -log softmax_d(s_nd / t)_n - log softmax_m(s_mn / t)_n ],  s = Q D^T

    over unit embeddings (q, e) and (d, e), of which the first q documents answer the queries in
    order and any others are hard negatives. What else is relevant to a query (`relevant_qd`) takes
    no part, so that a right answer is never pushed away.

    Why: it is what retrieval asks for, an answer nearer than everything else there is.
    """
    q = len(queries_qe)
    target_q = torch.arange(q, device=queries_qe.device)
    masked_qd = relevant_qd.clone()
    masked_qd[target_q, target_q] = False
    scores_qd = (queries_qe @ documents_de.T / temperature).masked_fill(masked_qd, -torch.inf)
    loss = torch.nn.functional.cross_entropy
    return (loss(scores_qd, target_q) + loss(scores_qd[:, :q].T, target_q)) / 2


@dataclass(frozen=True)
class ConceptGroups:
    """The concepts whose part in the energy is to grow (`up_c`) or to shrink (`down_c`).

    A concept has a point for being visual (modality score below 0.2) and one for being
    discriminative (it adds more to pairs than to hard negatives, on centred codes), and loses one
    for being text-dominant (above 0.8) and one for being a distractor (it adds more to hard
    negatives). Above zero it is to grow, below zero to shrink; those in between are left alone, as
    are concepts that never fire.
    """

    sae: SparseAutoencoder
    up_c: Tensor
    down_c: Tensor

    @classmethod
    def of(cls, sae: SparseAutoencoder, concepts: ConceptTable) -> ConceptGroups:
        """From the scores of an SAE's concepts."""
        fires_c, told_c = concepts.energy > 0, concepts.discriminative_centred
        points_c = (concepts.modality < 1 - TEXT_DOMINANT).int()
        points_c += (told_c > 0).int() - (told_c < 0).int()
        points_c -= (concepts.modality > TEXT_DOMINANT).int()
        return cls(sae, fires_c & (points_c > 0), fires_c & (points_c < 0))

    def to(self, device: torch.device) -> ConceptGroups:
        """The same on a device; the SAE is moved."""
        return ConceptGroups(self.sae.to(device), self.up_c.to(device), self.down_c.to(device))

    def energy(self, tokens_td: Tensor) -> Tensor:
        """Energy of all concepts, of those to grow and of those to shrink, on tokens: (t, 3).

        By parts, each computed again on the way back, so that codes of few tokens are alive at a
        time.
        """
        chunk = max(1, CHUNK_CODES // self.sae.n_concepts)
        parts = tokens_td.split(chunk)
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._energy(part_td) for part_td in parts])
        from torch.utils.checkpoint import checkpoint

        return torch.cat([checkpoint(self._energy, p, use_reentrant=False) for p in parts])

    def _energy(self, tokens_td: Tensor) -> Tensor:
        codes_tc = self.sae.encode(tokens_td)
        groups_c3 = torch.stack([torch.ones_like(self.up_c), self.up_c, self.down_c], dim=1)
        return codes_tc @ groups_c3.to(codes_tc)


def mean_shares(energy_n3: Tensor) -> tuple[float, float]:
    """Mean shares of items' energy in concepts to grow and to shrink."""
    shares_n3 = energy_n3 / energy_n3[:, TOTAL, None].clamp(min=1e-6)
    up, down = shares_n3.mean(0)[[UP, DOWN]].tolist()
    return up, down


def rebalancing(energy_n3: Tensor, before_n3: Tensor, shift: float) -> Tensor:
    """Each item's energy on its way to other concepts, by the frozen SAE's codes.

    With E the energy of all concepts of an item, p = E_up / E and m = E_down / E, and those of the
    unadapted model p0, m0, E0, the targets are p* = p0 + shift (1 - p0) and m* = (1 - shift) m0:

    L = mean_n [ ((p* - p) / (p* - p0))^2 + ((m - m*) / (m0 - m*))^2 + ln(E / E0)^2 ]

    The first two are 1 before training and 0 at the target; beyond it they grow again, since
    nothing else would end a move that has begun. Items without energy count for nothing.

    Why: most of the energy of an MLLM's embedding is in text-dominant concepts, and the concepts
    that add most to similarities are distractors (arXiv 2512.19115). Subtraction takes those away;
    this gives their part to what tells pictures apart. The last term forbids the easy ways: to
    silence all concepts, or to grow without bound.
    """
    (total_n, up_n, down_n), (total0_n, up0_n, down0_n) = energy_n3.T, before_n3.T
    known_n = (total_n.detach() > 0) & (total0_n > 0)
    tiny = 1e-6
    total_n, total0_n = total_n.clamp(min=tiny), total0_n.clamp(min=tiny)
    p0_n, m0_n = up0_n / total0_n, down0_n / total0_n
    to_go_n, to_shed_n = shift * (1 - p0_n), shift * m0_n
    missing_n = (p0_n + to_go_n - up_n / total_n) / to_go_n.clamp(min=0.01)
    excess_n = (down_n / total_n - m0_n + to_shed_n) / to_shed_n.clamp(min=0.01)
    kept_n = (total_n / total0_n).log()
    return (known_n * (missing_n**2 + excess_n**2 + kept_n**2)).mean()


def retention(
    hidden_td: Tensor, base_td: Tensor, unembedding_vd: Tensor, softcap: float | None, chunk: int
) -> Tensor:
    """Divergence of what the adapted model would say next from what the base would.

    L = mean_t KL( softmax(b_t U^T) || softmax(h_t U^T) )

    over the tokens of captions that follow their picture; h and b are the final hidden states
    (t, d) of the adapted model and of the base, U the unembedding (v, d). Logits of `chunk` tokens
    are alive at a time.

    Why: a contrastive loss alone may spend what the model knows about pictures; who embeds with it
    often also describes with it.
    """
    from torch.utils.checkpoint import checkpoint

    def divergence(h_td: Tensor, b_td: Tensor) -> Tensor:
        said, base = (_logits(x_td, unembedding_vd, softcap) for x_td in (h_td, b_td))
        return torch.nn.functional.kl_div(
            said.log_softmax(1), base.log_softmax(1), reduction="sum", log_target=True
        )

    parts = zip(hidden_td.split(chunk), base_td.split(chunk), strict=True)
    total = sum(checkpoint(divergence, h_td, b_td, use_reentrant=False) for h_td, b_td in parts)
    return torch.as_tensor(total) / len(hidden_td)


def _logits(x_td: Tensor, unembedding_vd: Tensor, softcap: float | None) -> Tensor:
    logits_tv = (x_td.to(unembedding_vd.dtype) @ unembedding_vd.T).float()
    return logits_tv if softcap is None else softcap * (logits_tv / softcap).tanh()
