"""The stage that chooses how the backbone is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patch_retriever.activations.collect import collect_pooled
from patch_retriever.activations.kept import KeptTokens, KeptWriter
from patch_retriever.backbones.cut import can_skip_mlp, stream_is_whole
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.readout import PAPER_READOUT, POOLINGS, TRIED, Readout, readout_grid
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.files import write_json
from patch_retriever.items import KINDS, Item
from patch_retriever.patch import fit
from patch_retriever.patch.calibration import pairs_to_images
from patch_retriever.patch.methods.alignment import MAX_CANONICAL
from patch_retriever.patch.operators import Affine
from patch_retriever.progress import Progress
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import evaluate_pooled

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor

_QUERIES_FOR_PROMPT, _QUERIES = 25, 100
"""Of every task, that prompts are compared on; then all readouts of one prompt."""
_PAIRS_FOR_MEANS, _PAIRS_FOR_ALIGNMENT = 25, 2000
"""Calibration pairs of every direction that readouts are centred and aligned by."""
_SHRINKAGE = 0.5
"""Of the covariances of that alignment."""
_KEPT = "tokens"


@dataclass(frozen=True)
class Scores:
    """Scores of a readout on validation: as it is, after centring per modality, and after an
    alignment from pairs (CCA), each with statistics from calibration."""

    raw: float
    centred: float
    aligned: float | None = None

    @property
    def best(self) -> float:
        """What readouts are compared by: every one is corrected before it is exported."""
        return max(self.raw, self.centred, self.aligned or 0.0)


def choose_readout(
    transformer: Transformer,
    data: Data,
    config: BuildConfig,
    folder: Path,
    progress: Progress,
) -> None:
    """Try every readout of the grid on validation; writes `readout.json` (all scores, the best),
    and keeps the tokens that it has read under the best.

    First the prompt, on a few queries of every task, by readouts as they are and centred, with
    means from a few calibration items. Then, for that prompt and on more queries, the end of the
    decoder and the pooling, by readouts aligned as well. (Alignments from half of the pairs put the
    last token alone before both parts on one seed of three; half of the queries changed nothing.)
    """
    if config.preset == "paper":
        chosen = replace(PAPER_READOUT, max_tokens=config.max_tokens)
        write_json(folder / "readout.json", {"chosen": chosen.to_json(), "scores": {}})
        return
    prompts = TRIED if config.prompt is None else (config.prompt,)
    poolings = POOLINGS if config.pooling is None else (config.pooling,)
    model = transformer.model
    every = readout_grid(
        n_layers(model),
        prompts,
        poolings,
        config.max_tokens,
        config.patch_at,
        can_skip_mlp(model),
    )
    grid = [readout for readout in every if stream_is_whole(model, readout.cut)]

    def pooled(
        items: Sequence[Item], readouts: Sequence[Readout], keep: KeptWriter | None = None
    ) -> dict[Readout, Tensor]:
        return collect_pooled(transformer, items, readouts, config.batch_size, progress, keep)

    calibration, validation = data.splits["calibration"], data.splits["validation"]
    scores: dict[Readout, Scores] = {}
    rest = grid
    if len(prompts) > 1:
        asked = some_queries(validation, _QUERIES_FOR_PROMPT)
        few = Sample.of(calibration, _PAIRS_FOR_MEANS)
        held_out, seen = pooled(asked.items, grid), pooled(few.items, grid)
        scores = {r: _scores(seen[r], few, held_out[r], asked, align=False) for r in grid}
        prompt = max(grid, key=lambda readout: scores[readout].best).prompt
        rest = [readout for readout in grid if readout.prompt == prompt]
    many = Sample.of(calibration, _PAIRS_FOR_ALIGNMENT)
    asked = some_queries(validation, _QUERIES)
    keep = KeptWriter(folder / _KEPT, data.items())
    # calibration first, if not all can be kept: its tokens are read by two stages
    seen, held_out = pooled(many.items, rest, keep), pooled(asked.items, rest, keep)
    scores |= {r: _scores(seen[r], many, held_out[r], asked, align=True) for r in rest}
    best = max(rest, key=lambda readout: scores[readout].best)
    values = {
        "chosen": best.to_json(),
        "scores": {readout.name: found.best for readout, found in scores.items()},
        "by": {readout.name: asdict(found) for readout, found in scores.items()},
    }
    keep.close(best)
    write_json(folder / "readout.json", values)


def some_queries(collection: Collection, queries: int) -> Collection:
    """A part of a collection: up to `queries` of every task, spread evenly over all, with what
    answers them; what answers one is there for the others to be told from it."""
    chosen: set[int] = set()
    for task in collection.tasks:
        every = max(1, -(-len(task.queries) // queries))
        for query, answers in list(zip(task.queries, task.relevant, strict=True))[::every]:
            chosen |= {query, *(task.documents[answer] for answer in answers)}
    return collection.subset(sorted(chosen))


@dataclass(frozen=True)
class Sample:
    """Some items of a collection with their kinds, and pairs of them by direction, (n, 2)."""

    items: tuple[Item, ...]
    kinds_n: Tensor
    pairs: dict[str, Tensor]

    @classmethod
    def of(cls, collection: Collection, pairs: int) -> Sample:
        """The items of up to `pairs` pairs of every direction, spread evenly over all."""
        chosen = {}
        for direction in dict.fromkeys(task.direction for task in collection.tasks):
            all_n2 = torch.from_numpy(collection.pairs((direction,)))
            every = max(1, -(-len(all_n2) // pairs))
            chosen[direction] = all_n2[::every]
        numbers_m, places = torch.cat(list(chosen.values())).unique(return_inverse=True)
        parts = places.split([len(pairs_n2) for pairs_n2 in chosen.values()])
        return cls(
            tuple(collection.items[i] for i in numbers_m.tolist()),
            torch.from_numpy(collection.kinds())[numbers_m].long(),
            dict(zip(chosen, parts, strict=True)),
        )


def _scores(
    seen_nd: Tensor, sample: Sample, held_out_nd: Tensor, validation: Collection, align: bool
) -> Scores:
    """Scores of pooled vectors of validation, with statistics from those of a sample."""
    kinds_n = torch.from_numpy(validation.kinds()).long()
    groups = [(sample.kinds_n == kind).nonzero()[:, 0] for kind in range(len(KINDS))]

    def score(step: Affine) -> float:
        return evaluate_pooled(step.by_kind(held_out_nd, kinds_n), validation).score

    aligned = None
    by_kind = pairs_to_images(sample.pairs.values(), sample.kinds_n)
    if align and 0 in by_kind:
        pairs = fit.PairStatistics(seen_nd, sample.kinds_n, by_kind)
        aligned = score(fit.cca(pairs, _SHRINKAGE, min(seen_nd.shape[1], MAX_CANONICAL)))
    return Scores(
        evaluate_pooled(held_out_nd, validation).score,
        score(fit.centre(fit.Statistics(seen_nd, groups, "modality"))),
        aligned,
    )


def load_readout(folder: Path) -> Readout:
    """The readout that `choose_readout` chose."""
    return Readout.from_json(json.loads((folder / "readout.json").read_text())["chosen"])


def kept_tokens(folder: Path, data: Data) -> KeptTokens | None:
    """The tokens that `choose_readout` read under the readout that it chose, if it read any."""
    kept = folder / _KEPT
    return KeptTokens(kept, data.items()) if kept.is_dir() else None
