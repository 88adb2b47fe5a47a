"""Figures 2 and 3 and Table 1: what the concepts' scores say, without any retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patch_retriever.analysis.exhibit import Exhibit
from patch_retriever.analysis.finished import Finished
from patch_retriever.concepts.energy import concentration, concepts_for
from patch_retriever.progress import Progress
from patch_retriever.report import plots

BINS = 40
SHARES = (0.01, 0.02, 0.05, 0.1)
"""Sizes of the top sets whose overlap is measured; the paper's is 1%."""


def modality_figure(build: Finished, _: Progress) -> Exhibit:
    """Fig. 2: energy by modality score."""
    concepts = build.calibration.concepts
    share_b, count_b = modality_bins(concepts.modality, concepts.energy)
    edges = [i / BINS for i in range(BINS + 1)]
    rows = [
        {
            "modality_from": edges[i],
            "modality_to": edges[i + 1],
            "energy_share": float(share_b[i]),
            "concepts": int(count_b[i]),
            "split": "calibration",
        }
        for i in range(BINS)
    ]
    fires = concepts.energy > 0
    weights = concepts.energy[fires] / concepts.energy.sum()
    figure = plots.histogram(
        concepts.modality[fires].tolist(),
        weights.tolist(),
        "modality score (0 image, 1 text)",
        "share of energy",
        bins=BINS,
    )
    names = ("image (below 0.2)", "between", "text (above 0.8)")
    bounds = ((-1.0, 0.2), (0.2, 0.8), (0.8, 2.0))
    summary = []
    for name, (low, high) in zip(names, bounds, strict=True):
        within = fires & (concepts.modality > low) & (concepts.modality <= high)
        energy = float(concepts.energy[within].sum() / concepts.energy.sum())
        summary.append(
            {
                "modality score": name,
                "concepts": int(within.sum()),
                "share of energy": f"{100 * energy:.1f}%",
            }
        )
    return Exhibit(rows, summary, {"": figure})


def modality_bins(modality_c: Tensor, energy_c: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """Share of energy and number of firing concepts in equal bins of the modality score, (bins,).

    A score of exactly 1 belongs to the last bin.
    """
    fires = energy_c > 0
    place = (modality_c[fires] * bins).long().clamp(max=bins - 1)
    share_b = torch.zeros(bins, dtype=torch.float64)
    share_b.index_add_(0, place, energy_c[fires].double())
    return share_b / energy_c.double().sum(), torch.bincount(place, minlength=bins)


def concentration_figure(build: Finished, _: Progress) -> Exhibit:
    """Fig. 3: the share of energy that the strongest concepts hold."""
    energy_c = build.calibration.concepts.energy
    held_c = concentration(energy_c)
    c = len(energy_c)
    steps = log_steps(c)
    rows = [
        {
            "concepts": n,
            "share_of_concepts": n / c,
            "share_of_energy": float(held_c[n - 1]),
            "split": "calibration",
        }
        for n in steps
    ]
    figure = plots.lines(
        [plots.Series("energy", steps, [100 * float(held_c[n - 1]) for n in steps])],
        f"concepts, strongest first (of {c})",
        "share of energy, %",
        x_scale="log",
    )
    summary = []
    for share in (0.5, 0.9, 0.99):
        n = concepts_for(energy_c, share)
        summary.append(
            {
                "share of energy": f"{100 * share:.0f}%",
                "concepts needed": n,
                "share of concepts": f"{100 * n / c:.2f}%",
            }
        )
    fires = int((energy_c > 0).sum())
    return Exhibit(rows, summary, {"": figure}, f"{fires} of {c} concepts fire on calibration.")


def log_steps(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def overlap_table(build: Finished, _: Progress) -> Exhibit:
    """Table 1: Jaccard of the top sets by energy, attribution and bridge score."""
    concepts = build.calibration.concepts
    scores = {"E": concepts.energy, "A": concepts.attribution, "B": concepts.bridge}
    c = len(concepts.energy)
    rows, summary = [], []
    for share in SHARES:
        n = max(1, int(c * share))
        sets = {name: top_set(score_c, n) for name, score_c in scores.items()}
        groups = [("E", "A"), ("E", "B"), ("A", "B"), ("E", "A", "B")]
        found = {f"J({', '.join(g)})": jaccard([sets[name] for name in g]) for g in groups}
        random = n / (2 * c - n)  # two sets of n out of c share n^2 / c on average
        found["J(two random sets)"] = random
        rows += [
            {"top_share": share, "set_size": n, "sets": k, "jaccard": v, "split": "calibration"}
            for k, v in found.items()
        ]
        cells = {k: f"{v:.3f}" for k, v in found.items()}
        summary.append({"top": f"{100 * share:.0f}% ({n} concepts)", **cells})
    return Exhibit(rows, summary)


def top_set(score_c: Tensor, n: int) -> set[int]:
    """The n concepts of the highest score."""
    return set(score_c.argsort(descending=True, stable=True)[:n].tolist())


def jaccard(sets: Sequence[set[int]]) -> float:
    """Size of the intersection over size of the union."""
    return len(set.intersection(*sets)) / len(set.union(*sets))
