"""What the concept table of older builds lacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patch_retriever.sae.codes import Codes


def top_items(codes: Codes, items_n: Tensor, concept: int, k: int) -> list[dict[str, Any]]:
    """Up to `k` of the given items that a concept is most active in, as the table has them."""
    part = codes[items_n]
    fires_e = part.concepts_e == concept
    values_m, order_m = part.values_e[fires_e].sort(descending=True, stable=True)
    found = items_n[part.rows_e[fires_e]][order_m]
    return [
        {"item": item, "value": value}
        for item, value in zip(found[:k].tolist(), values_m[:k].tolist(), strict=True)
    ]
