"""SAEs at every fourth layer of a real language model: what they explain of ordinary tokens.

    python recipes/real_lm_sae.py MODEL -o FOLDER [--scenes 60] [--site layers.12] [--sink 300]

MODEL is an MLLM's folder (recipes/real_lm makes one around SmolLM2). Drawn scenes with their texts
go through it once; every site's activations become a store in FOLDER, and an SAE (TopK, k 32, 16
concepts a dimension, at most 2,000,000 tokens) is trained on each. A token whose norm is over ten
times the median of its sequence is a sink: the store says so, and no training or figure sees it.
`--sink F` makes three more of every sequence: F times the median norm in three fixed dimensions of
the first token and two of the content. `--keep-sinks` lets training and figures see all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from patch_retriever import SAESettings
from patch_retriever.activations.sinks import sinks_nt
from patch_retriever.activations.store import Store
from patch_retriever.activations.writer import StoreWriter
from patch_retriever.backbones.families import layers_path
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.pooling import pooling_weights
from patch_retriever.backbones.readout import LAST, PROMPTS, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.probe import Probe
from patch_retriever.sae.settings import MOST_TOKENS
from patch_retriever.sae_training import train_sae
from patch_retriever.scenes.tasks import scenes_collection

CONTENT = [ROLES.index(role) for role in ("image", "text")]
SINK_DIMENSIONS = [7, 101, 303]
FEW_TOKENS = 8
"""Sequences with fewer content tokens get no made-up sinks."""


@dataclass(frozen=True)
class Row:
    """One site's figures."""

    site: str
    sinks: float
    """Share of tokens that are sinks."""
    largest: float
    """Norm of the largest token, in medians."""
    fvu_text: float
    fvu_image: float
    silent: float
    """Share of concepts that no held-out token fires; few tokens fire few."""
    dead: float
    """Share of concepts that none of the last tokens in training fired."""
    l0: float
    cosine: float
    seconds: float


def collect(model: str, folder: Path, sites: Sequence[str], scenes: int, prompt: str) -> None:
    """One forward pass over the scenes' items, one store per site."""
    transformer = load_backbone(model)
    readout = Readout(PROMPTS[prompt], pooling="lasttoken")
    set_readout(transformer, readout)
    probe, roles_of = Probe(transformer), TokenRoles(transformer)
    items = list(scenes_collection("calibration", scenes, 0).items)
    writers = {site: StoreWriter(folder / site) for site in sites}
    for numbers, features in item_batches(transformer, items, 32):
        mask_nt = features["attention_mask"].bool()
        tokens = probe.read(features, list(sites))
        pooled_nt = pooling_weights(mask_nt, "lasttoken") > 0
        items_nt = torch.tensor(numbers)[:, None].expand(mask_nt.shape)
        roles_nt = roles_of(features)
        for site, writer in writers.items():
            of_tokens = (tokens[site], roles_nt, pooled_nt, items_nt)
            writer.add(*(tensor[mask_nt] for tensor in of_tokens))
    for writer in writers.values():
        writer.close()


def with_sinks_named(
    source: Path, target: Path, site: str, factor: float, keep: bool
) -> tuple[float, float]:
    """A copy of a store that says which tokens are sinks (unless they are to be kept), after some
    were made, if `factor` says so.

    Returns:
        The share of sinks, and the largest norm in medians of its sequence.
    """
    store, writer = Store(source), StoreWriter(target, site=site)
    n_sinks, largest = 0, 0.0
    for x_td, roles_t, pooled_t, items_t in _items(store):
        norm_t = torch.linalg.vector_norm(x_td, dim=1)
        median = norm_t.median()
        content_t = torch.isin(roles_t, torch.tensor(CONTENT)).nonzero()[:, 0]
        if factor and len(content_t) >= FEW_TOKENS:
            for at in (0, int(content_t[2]), int(content_t[-3])):
                x_td[at, SINK_DIMENSIONS] += factor * median / len(SINK_DIMENSIONS) ** 0.5
            norm_t = torch.linalg.vector_norm(x_td, dim=1)
        (sink_t,) = sinks_nt(x_td[None], torch.ones(1, len(x_td), dtype=torch.bool))
        n_sinks += int(sink_t.sum())
        largest = max(largest, float((norm_t / median).max()))
        writer.add(x_td, roles_t, pooled_t, items_t, None if keep else sink_t)
    writer.close()
    return n_sinks / store.n_tokens, largest


def _items(store: Store) -> Iterator[tuple[Tensor, ...]]:
    """Every item's activations, roles, whether pooled, and number; an item lies in one shard."""
    for number in range(len(store.shards)):
        shard = store.read(number)
        _, counts = shard["items_t"].unique_consecutive(return_counts=True)
        names = ("activations_td", "roles_t", "pooled_t", "items_t")
        for parts in zip(*(shard[name].split(counts.tolist()) for name in names), strict=True):
            yield (parts[0].float(), *parts[1:])


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = [
        "| site | sinks | largest norm / median | FVU text | FVU image | silent | dead | "
        "L0 | cosine | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.site} | {r.sinks:.2%} | {r.largest:.0f} | {r.fvu_text:.3f} | {r.fvu_image:.3f} | "
        f"{r.silent:.1%} | {r.dead:.1%} | {r.l0:.1f} | {r.cosine:.3f} | {r.seconds:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


@click.command()
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--scenes", default=60, show_default=True, help="Scenes; 15 items each.")
@click.option("--prompt", default="one-word", show_default=True, type=click.Choice(list(PROMPTS)))
@click.option("--site", "sites", multiple=True, help="Only these. [default: every fourth layer]")
@click.option("--sink", default=0.0, help="Make sinks of this many times the median norm.")
@click.option("--keep-sinks", is_flag=True, help="Let training and figures see sinks.")
@click.option("--set", "given", multiple=True, metavar="KEY=JSON", help="Other SAE settings.")
def main(
    model: str,
    out: Path,
    scenes: int,
    prompt: str,
    sites: tuple[str, ...],
    sink: float,
    keep_sinks: bool,
    given: tuple[str, ...],
) -> None:
    """Collect once, then train an SAE at each site and print the table."""
    stores = out / "stores"
    if not stores.exists():
        transformer = load_backbone(model)
        layers: Any = transformer.model.get_submodule(layers_path(transformer.model))
        n_layers = len(layers)
        del transformer
        every_fourth = [f"layers.{n}" for n in range(0, n_layers, 4)]
        began = time.monotonic()
        collect(model, stores, [*every_fourth, LAST], scenes, prompt)
        click.echo(f"collected in {time.monotonic() - began:.0f} s", err=True)
    settings = SAESettings(k=32, expansion=16)
    others = dict(pair.split("=", 1) for pair in given)
    rows = []
    for site in sites or sorted((path.name for path in stores.iterdir()), key=_depth):
        name = f"{site}-sink{sink:.0f}"
        shares = with_sinks_named(stores / site, out / "named" / name, site, sink, keep_sinks)
        values = {"input_scale": "site" if site == LAST else "token"}
        values |= {key: json.loads(value) for key, value in others.items()}
        one = SAESettings(**{**asdict(settings), **values})
        assert (one.steps or 0) * one.batch_size <= MOST_TOKENS
        began = time.monotonic()
        where = out / "saes" / f"{name}-{time.time_ns()}"
        (trained,) = train_sae(where, out / "named" / name, [one])
        m = trained.metrics
        rows.append(
            Row(
                site,
                *shares,
                m.fvu_by_role["text"],
                m.fvu_by_role["image"],
                m.dead,
                trained.dead_in_training,
                m.l0,
                m.cosine,
                time.monotonic() - began,
            )
        )
        click.echo(json.dumps(asdict(rows[-1])), err=True)
    click.echo(table(rows))


def _depth(site: str) -> float:
    return float("inf") if site == LAST else int(site.removeprefix("layers."))


if __name__ == "__main__":
    main()
