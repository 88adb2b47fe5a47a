"""Singular values where LAPACK's faster way does not converge."""

from __future__ import annotations

import pytest
import torch

from patch_retriever.patch.fit.decomposition import svd


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", [(40, 40), (40, 12), (12, 40)])
@pytest.mark.parametrize("converges", [True, False])
def test_parts_rebuild_the_matrix(converges, shape, full, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in shape)
    matrix = left @ right.T

    if not converges:

        def fails(*_, **__):
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

        monkeypatch.setattr(torch.linalg, "svd", fails)
    u, s, vt = svd(matrix, full)
    assert (len(u.T) == shape[0], len(vt) == shape[1]) == (
        full or shape[0] == min(shape),
        full or shape[1] == min(shape),
    )
    k = min(shape)
    assert torch.allclose(u[:, :k] * s @ vt[:k], matrix, atol=1e-10)
    assert torch.allclose(u.T @ u, torch.eye(len(u.T), dtype=u.dtype), atol=1e-10)
    assert int((s > 1e-10 * s[0]).sum()) == 5
