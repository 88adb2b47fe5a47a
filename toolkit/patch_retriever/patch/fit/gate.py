"""The gate: hyperplanes that tell the kinds of items apart, as far as they can be told apart."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patch_retriever.items import KINDS
from patch_retriever.patch.operators import Gate

TOLERATED = 0.01
"""Share of a kind's items that a gate may take for another kind; one item of each always may."""

_FITTED_ON = 5_000
"""Items of each kind that hyperplanes are fitted on, at most; they are judged on all."""

TEXT, IMAGE, BOTH = range(3)
Labelled = tuple[Tensor, Tensor]
"""What a gate looks at (n, d), and the kinds of these items (n,)."""


@dataclass(frozen=True)
class GateChoice:
    """The finest gate that holds, and in words what it cannot tell apart (empty if nothing)."""

    gate: Gate | None
    note: str


def choose_gate(
    fitted_on: Labelled, asked: Collection[int], held_out: Labelled | None = None
) -> GateChoice:
    """The finest gate that takes no more than `TOLERATED` of a kind's items for another, on the
    items it is fitted on and on held-out ones.

    First all kinds are told apart. Where that fails, text is told from the rest, and items with
    both use the image's statistics; where that fails and no task has items with both, text from
    image alone. `asked` are the kinds that tasks hold: others cannot make a gate fail.
    """
    judged = [fitted_on] if held_out is None else [fitted_on, held_out]
    x_nd, kinds_n = fitted_on

    def tried(told: Collection[int], rows_n: Tensor, both_apart: bool) -> tuple[Gate, str]:
        rows = torch.cat([_spread((rows_n & (kinds_n == k)).nonzero()[:, 0]) for k in range(3)])
        rows = rows.sort().values
        gate = fit_gate(x_nd[rows], kinds_n[rows], both_apart)
        wrong = [errors(gate, *items) for items in judged]
        worst = {k: max(one.get(k, (0.0, True))[0] for one in wrong) for k in told}
        held = all(one[k][1] for one in wrong for k in told if k in one)
        worst_kind = max(worst, key=lambda k: worst[k])
        said = (
            "" if held else f"{100 * worst[worst_kind]:.1f}% of {_NAMES[worst_kind]} go another way"
        )
        return replace(gate, error=worst[worst_kind]), said

    every_n = torch.ones_like(kinds_n, dtype=torch.bool)
    gate, failed = tried((TEXT, IMAGE, BOTH), every_n, True)
    if not failed:
        return GateChoice(gate, "")
    at_most = f"{100 * TOLERATED:g}% is tolerated"
    note = (
        f"items with image and text cannot be told from others ({failed}, {at_most}), so they use "
        "the statistics of images"
    )
    gate, failed = tried(sorted(asked), every_n, False)
    if failed and BOTH not in asked:
        gate, failed = tried(sorted(asked), kinds_n != BOTH, False)
    if not failed:
        return GateChoice(gate, note)
    return GateChoice(
        None,
        f"texts cannot be told from images by the mean of their tokens ({failed}, {at_most}), "
        "so statistics per modality cannot be exported",
    )


_NAMES = ("texts", "images", "items with both")


def _spread(rows_m: Tensor) -> Tensor:
    """Up to `_FITTED_ON` of some rows, evenly over all."""
    return rows_m[:: max(1, -(-len(rows_m) // _FITTED_ON))]


def errors(gate: Gate, x_nd: Tensor, kinds_n: Tensor) -> dict[int, tuple[float, bool]]:
    """For each kind that occurs: the share of its items that go another kind's way, and whether
    that is tolerated."""
    found_n = gate.kinds(x_nd)
    found = {}
    for kind in range(len(KINDS)):
        way = kind if gate.tells_both else min(kind, IMAGE)
        of_kind_m = found_n[torch.eq(kinds_n, kind)]
        if n := len(of_kind_m):
            wrong = int((of_kind_m != way).sum())
            found[kind] = (wrong / n, wrong <= max(1, TOLERATED * n))
    return found


def fit_gate(mean_nd: Tensor, kinds_n: Tensor, both_apart: bool = True) -> Gate:
    """The hyperplanes between kinds (linear support vector machines), with the largest share of a
    kind's items that lie on the wrong side.

    A kind that does not occur is never chosen; items with both are images unless `both_apart`.
    """
    from sklearn.svm import LinearSVC

    x_nd = mean_nd.double()
    middle_d, scale_d = _robust(x_nd)
    z = ((x_nd - middle_d) / scale_d).numpy()
    directions, offsets, margin = [], [], float("inf")
    for kind in (IMAGE, BOTH):
        positive_n = (kinds_n >= kind).numpy()
        never = kind == BOTH and not both_apart
        if never or positive_n.all() or not positive_n.any():
            always = bool(positive_n.all()) and not never
            directions.append(torch.zeros(x_nd.shape[1]).double())
            offsets.append(torch.tensor(1.0 if always else -1.0).double())
            continue
        machine = LinearSVC(C=1.0, tol=1e-6, max_iter=20_000, random_state=0).fit(z, positive_n)
        direction_d = torch.from_numpy(machine.coef_[0]) / scale_d
        offset = torch.tensor(float(machine.intercept_[0])) - direction_d @ middle_d
        signed_n = (x_nd @ direction_d + offset) * torch.where(torch.from_numpy(positive_n), 1, -1)
        unit = _unit(signed_n)
        margin = min(margin, float(unit / signed_n.abs().mean()))
        directions.append(direction_d / unit)
        offsets.append(offset / unit)
    gate = Gate(torch.stack(directions).float(), torch.stack(offsets).float(), margin)
    wrong = errors(gate, mean_nd, kinds_n).values()
    return replace(gate, error=max((share for share, _ in wrong), default=0.0))


def _unit(signed_n: Tensor) -> Tensor:
    """The distance of the closest item from its hyperplane; where some lie on the wrong side, of
    the closest but for as many as may."""
    if float(signed_n.min()) > 0:
        return signed_n.min()
    rank = max(1, round(TOLERATED * len(signed_n)))
    return signed_n.abs().kthvalue(rank).values.clamp(min=1e-12)


def _robust(x_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Median and scale of every dimension, each (d,): the median absolute deviation as a standard
    deviation, so that a few massive activations do not set it.

    Not below a tenth of the standard deviation, since what is mostly constant tells kinds apart,
    too; nor below what float32 keeps of the dimension's size.
    """
    middle_d = x_nd.median(0).values
    off_nd = (x_nd - middle_d).abs()
    scale_d = (1.4826 * off_nd.median(0).values).maximum(x_nd.std(0, correction=0) / 10)
    kept_d = 1e-5 * x_nd.abs().amax(0)
    return middle_d, scale_d.maximum(kept_d).clamp(min=1e-30)
