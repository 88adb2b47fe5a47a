"""The gate: hyperplanes that tell the kinds of items apart."""

from __future__ import annotations

import torch
from torch import Tensor

from patch_retriever.patch.operators import Gate


def fit_gate(mean_nd: Tensor, kinds_n: Tensor) -> Gate | None:
    """The two hyperplanes between kinds (linear support vector machines), or None.

    None where some calibration item lies on the wrong side: statistics per modality cannot be
    exported exactly then. A kind that does not occur is never chosen.
    """
    from sklearn.svm import LinearSVC

    x_nd = mean_nd.double()
    mean_d = x_nd.mean(0)
    scale = (x_nd - mean_d).pow(2).mean().sqrt().clamp(min=1e-30)
    z = ((x_nd - mean_d) / scale).numpy()
    directions, offsets, margin = [], [], float("inf")
    for kind in (1, 2):
        positive_n = (kinds_n >= kind).numpy()
        if positive_n.all() or not positive_n.any():
            directions.append(torch.zeros(x_nd.shape[1]).double())
            offsets.append(torch.tensor(1.0 if positive_n.all() else -1.0).double())
            continue
        machine = LinearSVC(C=1.0, tol=1e-6, max_iter=20_000, random_state=0).fit(z, positive_n)
        direction_d = torch.from_numpy(machine.coef_[0]) / scale
        offset = torch.tensor(float(machine.intercept_[0])) - direction_d @ mean_d
        signed_n = (x_nd @ direction_d + offset) * torch.where(torch.from_numpy(positive_n), 1, -1)
        if float(signed_n.min()) <= 0:
            return None
        margin = min(margin, float(signed_n.min() / signed_n.mean()))
        # one unit from the hyperplane to the closest calibration item
        directions.append(direction_d / signed_n.min())
        offsets.append(offset / signed_n.min())
    return Gate(torch.stack(directions).float(), torch.stack(offsets).float(), margin)
