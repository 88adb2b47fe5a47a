"""`patch-retriever train-sae`."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patch_retriever.cli import options
from patch_retriever.sae.settings import POOLED_SHARE, SAESettings

if TYPE_CHECKING:
    from patch_retriever.sae.train import Now, TrainedSAE

DEFAULTS = SAESettings()


@click.command("train-sae")
@click.argument("store", required=False, type=click.Path(path_type=Path))
@options.out_folder
@click.option(
    "--architecture",
    multiple=True,
    type=click.Choice(["topk", "batch-topk", "matryoshka", "jumprelu"]),
    default=[DEFAULTS.architecture],
    show_default=True,
    help="What decides which concepts are active.",
)
@click.option(
    "--k",
    multiple=True,
    type=click.IntRange(1),
    default=[DEFAULTS.k],
    show_default=True,
    help="Active concepts per token, exactly or on average.",
)
@click.option(
    "--expansion",
    multiple=True,
    type=click.IntRange(1),
    default=[DEFAULTS.expansion],
    show_default=True,
    help="Concepts per dimension.",
)
@click.option(
    "--seed",
    multiple=True,
    type=click.IntRange(0),
    default=[0],
    show_default=True,
    help="Of the weights; the first one's also of the order of tokens.",
)
@click.option(
    "--input-scale",
    type=click.Choice(["auto", "token", "site"]),
    default=DEFAULTS.input_scale,
    show_default=True,
    help="Standardise every token by itself, or all tokens of the site alike. auto: by token after "
    "a decoder layer, where norms differ a hundredfold.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=DEFAULTS.steps,
    help="Steps of training.  [default: three epochs, of 614,400 to 2,048,000 tokens]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=DEFAULTS.batch_size,
    show_default=True,
    help="Tokens a step.",
)
@click.option(
    "--lr",
    type=click.FloatRange(0),
    default=DEFAULTS.lr,
    help="Learning rate of Adam.  [default: 0.002, less with more than 1,536 concepts]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default=DEFAULTS.precision,
    show_default=True,
    help="Of the product that selects; chosen codes are always computed in float32.",
)
@click.option(
    "--shared",
    type=click.Choice(["none", "iso-energy", "group-sparse"]),
    default=DEFAULTS.shared,
    show_default=True,
    help="Let the store's image-text pairs pull concepts together.",
)
@click.option(
    "--shared-weight",
    type=click.FloatRange(0),
    default=DEFAULTS.shared_weight,
    show_default=True,
    help="How strongly they do.",
)
@click.option(
    "--option",
    "given",
    multiple=True,
    metavar="KEY=VALUE",
    help="What only one architecture has: prefixes=[0.25,1], bandwidth=0.05, l0_weight=0.3.",
)
@click.option(
    "--pooled-share",
    type=click.FloatRange(0, 0.99),
    default=POOLED_SHARE,
    show_default=True,
    help="Repeat tokens that the readout pools until they are this share of what training sees.",
)
@click.option("--model", default="tiny-mllm", show_default=True, help="Backbone, without a STORE.")
@options.revision
@click.option("--pairs", default="scenes", show_default=True, help="Its items, without a STORE.")
@click.option(
    "--prompt",
    type=click.Choice(["plain", "paper", "one-word"]),
    default="paper",
    show_default=True,
    help="Its prompt, without a STORE.",
)
@options.device
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Steps after which a stopped training could go on.",
)
@click.option(
    "--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's event files."
)
@options.as_json
def train_sae(
    store: Path | None,
    out: Path,
    architecture: tuple[str, ...],
    k: tuple[int, ...],
    expansion: tuple[int, ...],
    seed: tuple[int, ...],
    given: tuple[str, ...],
    pooled_share: float,
    model: str,
    revision: str | None,
    pairs: str,
    prompt: str,
    device: str,
    checkpoint_every: int,
    tensorboard: Path | None,
    as_json: bool,
    **common: Any,
) -> None:
    """Train SAEs on the activations of STORE (a build's OUT/run/collect) into OUT.

    Without STORE, activations come straight from the backbone and are not stored. Options that
    are given several times train one SAE for every combination, all in one pass over the tokens,
    each into a folder of its own. A stopped training goes on when the same command is run again.
    OUT is in SAELens' layout: SAE.load_from_disk(OUT) reads it.

    \b
    patch-retriever train-sae demo/run/collect -o sae
    patch-retriever train-sae demo/run/collect --k 16 --k 32 --seed 0 --seed 1 -o saes
    patch-retriever train-sae demo/run/collect --architecture matryoshka --shared iso-energy -o sae
    patch-retriever train-sae --model org/model --pairs photos.jsonl -o sae
    accelerate launch -m patch_retriever train-sae demo/run/collect --device cuda -o sae
    """
    from patch_retriever.cli.progress import Narrator, board, quiet_libraries
    from patch_retriever.sae_training import folder_names, stabilities
    from patch_retriever.sae_training import train_sae as train

    own_options = _options(given)
    settings = [
        SAESettings(
            architecture=a,
            k=n,
            expansion=e,
            seed=s,
            options=_own(a, own_options, architecture),
            **common,
        )
        for a, n, e, s in product(architecture, k, expansion, seed)
    ]
    quiet_libraries()
    narrator = Narrator(silent=as_json)
    speaks = os.environ.get("RANK", "0") == "0"  # the first process speaks for all
    watches = [narrator.watch] + ([board(tensorboard)] if tensorboard and speaks else [])

    def watch(now: Now) -> None:
        for each in watches:
            each(now)

    trained = train(
        out,
        store,
        settings,
        model=model,
        revision=revision,
        pairs=pairs,
        prompt=prompt,
        pooled_share=pooled_share,
        device=device,
        checkpoint_every=checkpoint_every,
        progress=narrator.progress,
        watch=watch,
    )
    if not speaks:
        return
    found = dict(zip(folder_names(settings), trained, strict=True))
    stable = stabilities(trained)
    if as_json:
        saes = {name: one.about() for name, one in found.items()}
        click.echo(json.dumps({"folder": str(out), "saes": saes, "stability": stable}, indent=1))
        return
    for name, one in found.items():
        click.echo(f"{out / name}\n{describe(one)}")
    for name, value in stable.items():
        click.echo(f"stability of {name}: {value:.3f}")


def describe(trained: TrainedSAE) -> str:
    """Figures of an SAE for a terminal."""
    m, how = trained.metrics, trained.settings
    scale = "each token" if how.input_scale == "token" else "the site"
    figures = (
        f"  on the images' and texts' among {m.tokens} held-out tokens: FVU {m.fvu:.4f}, "
        f"L0 {m.l0:.1f}, cosine {m.cosine:.3f}, {m.neighbours:.1%} of nearest neighbours kept",
        f"  concepts: {trained.dead_in_training:.1%} dead at the end of training, {m.dead:.1%} "
        f"silent on all held-out tokens, {m.dense:.1%} on more than a tenth of them",
        *(
            f"  {name}: {n} tokens, {_fvu(m.fvu_by_role.get(name))}, L0 {m.l0_by_role[name]:.1f}, "
            f"cosine {m.cosine_by_role[name]:.3f}, {m.dead_by_role[name]:.1%} of concepts silent"
            for name, n in m.tokens_by_role.items()
        ),
    )
    return "\n".join(
        (
            f"  {trained.sae.d_in} dimensions, {trained.sae.n_concepts} concepts, "
            f"{how.architecture} k {how.k}, one scale for {scale}, {how.steps} steps of "
            f"{how.batch_size} tokens; {trained.conversion}",
            *figures,
        )
    )


def _fvu(value: float | None) -> str:
    return "all alike" if value is None else f"FVU {value:.4f}"


def _own(name: str, given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options that this architecture has; one that none of the trained ones has is kept for
    the error that it deserves."""
    from dataclasses import fields

    from patch_retriever.sae.architectures import ARCHITECTURES

    known = {n: {field.name for field in fields(ARCHITECTURES[n])} for n in names}
    anyones = set().union(*known.values())
    return {k: v for k, v in given.items() if k in known[name] or k not in anyones}


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE, values in JSON."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            found[key] = json.loads(value)
        except ValueError:
            equals = ""
        if not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE with a number or a list")
    return found
