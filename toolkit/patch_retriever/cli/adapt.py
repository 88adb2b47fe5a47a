"""`patch-retriever adapt`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patch_retriever.cli import options
from patch_retriever.cli.build import run_build

if TYPE_CHECKING:
    from patch_retriever.config import BuildConfig


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--pairs",
    metavar="FILE|FOLDER|datasets:ID",
    help="Train on these, none of whose pictures may be held out. [default: the build's own "
    "calibration pairs]",
)
@click.option("--method", type=click.Choice(["lora", "dora", "ia3"]), help="[default: lora]")
@click.option("--rank", type=click.IntRange(1), help="Of LoRA and DoRA. [default: 16]")
@click.option(
    "--projector", is_flag=True, default=None, help="Adapt the vision projector, too, by LoRA."
)
@click.option(
    "--without-patch",
    "with_patch",
    flag_value=False,
    type=bool,
    default=None,
    help="Train without the patch in the forward pass.",
)
@click.option("--steps", type=click.IntRange(1), help="Steps of training. [default: 500]")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate of AdamW.")
@click.option("--batch-size", type=click.IntRange(2), help="Pairs contrasted with each other.")
@click.option("--hard-negatives", type=click.IntRange(0), help="Of each pair, mined with FAISS.")
@click.option(
    "--chunk-size",
    type=click.IntRange(1),
    help="Items in a pass with gradients; lower it for memory, the loss stays the same.",
)
@click.option("--accumulate", type=click.IntRange(1), help="Batches to a step. [default: 1]")
@click.option(
    "--gradient-checkpointing", is_flag=True, default=None, help="Less memory, more time."
)
@click.option("--contrastive", type=click.FloatRange(0), help="Weight of that loss.")
@click.option("--rebalancing", type=click.FloatRange(0), help="Weight of that loss.")
@click.option("--retention", type=click.FloatRange(0), help="Weight of that loss.")
@click.option("--patience", type=click.IntRange(1), help="Looks without a gain before it stops.")
@click.option("--seed", type=click.IntRange(0), help="[default: the build's]")
@click.option(
    "--separate",
    "merge",
    flag_value=False,
    type=bool,
    default=None,
    help="Export the adapter beside the base's weights instead of merging it into them; the export "
    "then needs peft and trust_remote_code=True.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be trained and what fits into memory."
)
@options.as_json
def adapt(run: Path, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Train an adapter through the patch of RUN (what `build` made), and export it there.

    The language model's layers get a LoRA, DoRA or IA3 adapter, trained by a contrastive loss, by
    one that moves energy from distractors to visual and discriminative concepts, and by one that
    keeps what the model says about pictures (docs/adapters.md). The patch is then fitted anew.
    Validation decides between the adapted model and the patch alone; the table has both.

    The training stops early when validation no longer rises. Stopped, it goes on when the same
    command is run again. `build` on RUN, without --adapter, brings the unadapted export back.

    \b
    patch-retriever adapt demo
    patch-retriever adapt mine --pairs more.jsonl --rank 16 --steps 500
    patch-retriever adapt mine --method dora --rebalancing 0 --separate
    patch-retriever adapt mine --dry-run              what fits into 8, 24 and 80 GB
    """
    config = adapt_config(run, asked)
    if not dry_run:
        return run_build(run, config, as_json)
    from patch_retriever.cli.progress import quiet_libraries

    quiet_libraries()
    found = plan(config)
    return click.echo(json.dumps(found, indent=1) if as_json else _text(found))


def adapt_config(run: Path, asked: dict[str, Any]) -> BuildConfig:
    """The settings of the build in `run`, with an adapter as `asked` for.

    Raises:
        UserError: it is no finished build, or a setting is wrong.
    """
    from patch_retriever.config import BuildConfig
    from patch_retriever.runs import MARKER, check_finished

    check_finished(run)
    said = {name: value for name, value in asked.items() if value is not None}
    config = BuildConfig.read(run / MARKER, adapter=said)
    return config.model_copy(update={"adapter_from": None, "method": None})


def plan(config: BuildConfig) -> dict[str, Any]:
    """What a training would adapt, and what of it fits into how much memory, as JSON values."""
    from patch_retriever.adapters.memory import SIZES, Shape, suggest
    from patch_retriever.backbones.load import load_backbone

    assert config.adapter is not None
    transformer = load_backbone(
        config.model, config.dtype, revision=config.revision, max_pixels=config.max_pixels
    )
    shape = Shape.of(transformer, config.adapter)
    tokens = tokens_of_a_picture(transformer)
    found = suggest(shape, config.adapter, tokens, SIZES)
    return {
        "model": config.model,
        "parameters": shape.parameters,
        "adapter parameters": config.adapter.rank * shape.per_rank
        if config.adapter.method != "ia3"
        else None,
        "tokens of an item": tokens,
        "memory": [one.to_json() for one in found],
    }


def tokens_of_a_picture(transformer: Any) -> int:
    """Tokens of a picture of 640 by 480 pixels, as the model is given one."""
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (640, 480))}]
    features = transformer.preprocess([[{"role": "user", "content": content}]])
    return int(features["input_ids"].shape[1])


def _text(found: dict[str, Any]) -> str:
    """A plan for a terminal."""
    lines = [
        f"{found['model']}: {found['parameters']:,} parameters; a picture of 640 x 480 is "
        f"{found['tokens of an item']} tokens"
    ]
    if found["adapter parameters"]:
        lines.append(f"the adapter has {found['adapter parameters']:,} parameters")
    for one in found["memory"]:
        said = f"does not fit: {one['estimate_gib']} GiB estimated for one item at a time"
        if one["fits"]:
            flag = " --gradient-checkpointing" if one["gradient_checkpointing"] else ""
            said = f"--chunk-size {one['chunk_size']}{flag} ({one['estimate_gib']} GiB estimated)"
        lines.append(f"{one['memory_gib']:>3} GB: {said}")
    return "\n".join(lines)
