"""The concept table: one Parquet file a run, a row a concept.

Its columns are the scores (the fields of `ConceptTable`), `concept` (the row's number), and

- `top_images`, `top_texts`: the items of the calibration split in which the concept is most active
  (list of {item: int32, value: float}, largest first; items that are an image, or a text, alone);
- `tokens`: the vocabulary tokens that its dictionary row speaks for most (list of strings; the
  column's metadata says which unembedding);
- `strength`: how much of it the exported patch subtracts (0: left alone), and `why`: by which
  method and for what reason. The table has these two once a patch is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patch_retriever.files import write
from patch_retriever.items import KINDS
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.ops import starts_of

if TYPE_CHECKING:
    import pyarrow as pa

TOP = 8
"""How many items, and how many tokens, a concept's row shows."""


@dataclass(frozen=True)
class ConceptTable:
    """The scores: one entry per concept in every field, each (c,). Formulas are in `scores`."""

    energy: Tensor
    """Mean activation over all items (Eq. 3)."""
    energy_texts: Tensor
    """Mean activation over the items that are a text alone."""
    energy_images: Tensor
    """Mean activation over the items that are an image alone."""
    energy_both: Tensor
    """Mean activation over the items that are image and text; 0 where there are none."""
    frequency: Tensor
    """Share of all items in which the concept is active."""
    modality: Tensor
    """energy_texts / (energy_texts + energy_images): 1 text, 0 image (Eq. 4); 0.5 where neither
    kind of item makes it fire."""
    bridge: Tensor
    """Row sum plus column sum of |B| (Eq. 5)."""
    attribution: Tensor
    """What it adds to twice the inner products of pairs (Eq. 6-7)."""
    discriminative: Tensor
    """What it adds to pairs less what it adds to hard negatives."""
    discriminative_centred: Tensor
    """The same on codes less their kind's mean, with hard negatives of centred embeddings."""
    role_image: Tensor
    """Mean activation over all image tokens (NaN in this and the next three where the features
    were collected without roles)."""
    role_text: Tensor
    """Mean activation over all tokens of texts."""
    role_instruction: Tensor
    """Mean activation over all tokens of the prompt."""
    role_special: Tensor
    """Mean activation over all special tokens, those of the chat template among them."""

    def save(self, path: Path, more: pa.Table | None = None) -> None:
        """Write a Parquet file with one row per concept; `more` has further columns."""
        import pyarrow as pa

        columns: dict[str, pa.Array] = {"concept": pa.array(range(len(self.energy)), pa.int32())}
        columns |= {f.name: pa.array(getattr(self, f.name).numpy()) for f in fields(self)}
        table = pa.table(columns)
        if more is not None:
            for field, column in zip(more.schema, more.columns, strict=True):
                table = table.append_column(field, column)
        write_table(table, path)

    @classmethod
    def load(cls, path: Path) -> ConceptTable:
        """Read the scores that `save` wrote."""
        import pyarrow.parquet as pq

        names = [f.name for f in fields(cls)]
        table = pq.read_table(path, columns=names)
        return cls(**{name: torch.tensor(table[name].to_numpy()) for name in names})


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as Parquet."""
    import pyarrow.parquet as pq

    write(path, lambda p: pq.write_table(table, p))


def examples(codes: Codes, kinds_n: Tensor, tokens: list[list[str]], unembedding: str) -> pa.Table:
    """The columns `top_images`, `top_texts` and `tokens`, the last from this `unembedding`."""
    import pyarrow as pa

    image_m, text_m = (
        torch.eq(kinds_n, KINDS.index(kind)).nonzero()[:, 0] for kind in ("image", "text")
    )
    columns = [top_items(codes, image_m), top_items(codes, text_m), pa.array(tokens)]
    names = ("top_images", "top_texts", "tokens")
    schema = [pa.field(n, column.type) for n, column in zip(names, columns, strict=True)]
    schema[2] = schema[2].with_metadata({"unembedding": unembedding})
    return pa.table(columns, pa.schema(schema))


def top_items(codes: Codes, items_m: Tensor, top: int = TOP) -> pa.Array:
    """For every concept those of `items_m` in which it is most active, as the column holds them.

    Among equals the smaller number comes first; a concept that fires in fewer has fewer. Entries
    are sorted, never a dense column.
    """
    import pyarrow as pa

    active = codes[items_m].transposed()
    order_e = active.values_e.argsort(stable=True, descending=True)
    order_e = order_e[active.rows_e[order_e].argsort(stable=True)]
    rank_e = torch.arange(len(order_e)) - active.starts_n1[:-1][active.rows_e]
    chosen_e = order_e[rank_e < top]
    starts_c1 = starts_of(active.active_n.clamp(max=top))
    items = pa.array(items_m[active.concepts_e[chosen_e]].int().numpy())
    values = pa.array(active.values_e[chosen_e].float().numpy())
    entries = pa.StructArray.from_arrays([items, values], names=["item", "value"])
    return pa.ListArray.from_arrays(pa.array(starts_c1.int().numpy()), entries)


def add_selection(scored: Path, strengths: Mapping[int, float], why: str, target: Path) -> None:
    """The table at `scored` with the columns `strength` and `why`, written to `target`.

    `strengths` has the concepts that a patch subtracts, `why` says by which method.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(scored)
    numbers = range(table.num_rows)
    strength = pa.array([strengths.get(i, 0.0) for i in numbers], pa.float32())
    reason = pa.array([why if i in strengths else "" for i in numbers])
    write_table(table.append_column("strength", strength).append_column("why", reason), target)
