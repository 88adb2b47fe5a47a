"""Features: what every patch of a readout is fitted on and judged by, for a split's items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patch_retriever.files import write_tensors
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Features:
    """Unnormalised pooled vectors, the concepts' codes pooled the same way, and kinds of items.

    A readout of two parts pools (n, 2 d) vectors; codes are of the first part, and subtracting
    concepts changes that one alone.

    `mean_nd` are the raw tokens' means whatever the readout's pooling: the gate looks at them.
    Since pooling is linear in the tokens, every patch that subtracts concepts can be evaluated
    from these alone, without another forward pass.

    `role_energy_cr`, where it was asked for, is every concept's mean activation on the tokens of
    each role (index into `ROLES`; all tokens of all items, whatever the pooling reads).

    `scale_n` are the tokens' scales pooled like the tokens, where the SAE has a scale per token.
    """

    pooled_nd: Tensor
    mean_nd: Tensor
    codes: Codes
    kinds_n: Tensor
    role_energy_cr: Tensor | None = None
    scale_n: Tensor | None = None

    def reconstructed(self, sae: SparseAutoencoder) -> Tensor:
        """Pooled vectors as the SAE rebuilds them: what it misses is what they lack. A second part,
        which it does not see, stays as it is."""
        first_nd, second_nd = self.pooled_nd.tensor_split([sae.d_in], dim=1)
        return torch.cat([sae.decode(self.codes, first_nd, self.scale_n), second_nd], dim=1)

    def rows(self, rows_m: Tensor) -> Features:
        """Those of some items, in the given order; without energies by role, which are of all."""
        return Features(
            self.pooled_nd[rows_m],
            self.mean_nd[rows_m],
            self.codes[rows_m],
            self.kinds_n[rows_m],
            scale_n=None if self.scale_n is None else self.scale_n[rows_m],
        )

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Several sets of items after each other; one set stays as it is."""
        if len(parts) == 1:
            return parts[0]
        pooled_nd, mean_nd, kinds_n = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("pooled_nd", "mean_nd", "kinds_n")
        )
        scales = [part.scale_n for part in parts if part.scale_n is not None]
        codes = Codes.stacked([part.codes for part in parts])
        return cls(
            pooled_nd, mean_nd, codes, kinds_n, scale_n=torch.cat(scales) if scales else None
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"pooled_nd": self.pooled_nd, "mean_nd": self.mean_nd, "kinds_n": self.kinds_n}
        tensors |= {k: getattr(self.codes, k) for k in ("starts_n1", "concepts_e", "values_e")}
        tensors["n_concepts"] = self.codes.starts_n1.new_tensor([self.codes.n_concepts])
        if self.role_energy_cr is not None:
            tensors["role_energy_cr"] = self.role_energy_cr
        if self.scale_n is not None:
            tensors["scale_n"] = self.scale_n
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        t = load_file(path)
        codes = Codes(t["starts_n1"], t["concepts_e"], t["values_e"], int(t["n_concepts"]))
        optional = (t.get("role_energy_cr"), t.get("scale_n"))
        return cls(t["pooled_nd"], t["mean_nd"], codes, t["kinds_n"], *optional)
