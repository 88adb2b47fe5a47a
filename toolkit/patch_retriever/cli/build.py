"""`patch-retriever build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patch_retriever.cli import options

if TYPE_CHECKING:
    from patch_retriever.config import BuildConfig


@click.command()
@click.argument("model", required=False)
@options.revision
@click.option(
    "--pairs",
    metavar="FILE|FOLDER|datasets:ID|scenes",
    help="Pictures with texts. [default: scenes, the built-in world]",
)
@click.option("--image-column", help="The pairs' column of pictures, if not found by itself.")
@click.option("--text-column", help="The pairs' column of texts, if not found by itself.")
@click.option(
    "--allow-urls",
    is_flag=True,
    default=None,
    help="Download pictures that pairs name by an address.",
)
@options.out_folder
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Settings in YAML.")
@click.option(
    "--preset",
    type=click.Choice(["auto", "paper"]),
    help="auto tries readouts on validation, paper pins the paper's. [default: auto]",
)
@click.option(
    "--prompt",
    metavar="plain|paper|one-word|e5v|system|FILE.yaml",
    help="The only prompt to try, by name or your own (docs/inputs.md).",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "lasttoken", "mean+lasttoken"]),
    help="The only pooling to try; mean+lasttoken puts both beside each other.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Longest input in tokens; texts are cut, pictures never. [default: the model's own]",
)
@click.option(
    "--sae",
    metavar="FOLDER|ID",
    help="An SAE to use instead of training one: SAELens, sparsify, dictionary_learning.",
)
@click.option(
    "--codes",
    type=click.Choice(["tokens", "pooled"]),
    help="Score concepts on codes of tokens or of pooled vectors. [default: tokens]",
)
@click.option(
    "--adapter",
    metavar="lora|dora|ia3|FOLDER",
    help="Train an adapter through the patch, or take one from a folder in peft's layout; the "
    "patch is then fitted anew. Its settings: `adapter:` in --config, or `adapt` on a build.",
)
@click.option(
    "--patch-at",
    metavar="layers.N",
    help="Subtract concepts after decoder layer N instead of at the readout; the export then needs "
    "trust_remote_code=True.",
)
@options.method
@click.option("--seed", type=click.IntRange(0), help="Seed of everything random. [default: 0]")
@click.option("--device", help="torch device. [default: cpu]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="Of the model; auto is that of its files. [default: float32]",
)
@click.option(
    "--device-map",
    metavar="auto|JSON",
    help="In place of --device: auto spreads the model over all devices, the CPU and the disk.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    metavar="N",
    help="Of a picture, where the model makes more tokens of a larger one.",
)
@click.option(
    "--attention",
    metavar="NAME",
    help="sdpa, eager, flash_attention_2, ... [default: transformers' choice]",
)
@click.option("--batch-size", type=click.IntRange(1), help="Items per forward pass. [default: 64]")
@click.option(
    "--skip-bad",
    is_flag=True,
    default=None,
    help="Leave bad rows and pictures out, and count them.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be done and what it takes (disk, memory, minutes), and do nothing.",
)
@options.as_json
def build(
    model: str | None,
    revision: str | None,
    pairs: str | None,
    image_column: str | None,
    text_column: str | None,
    allow_urls: bool | None,
    out: Path,
    config_file: Path | None,
    preset: str | None,
    prompt: str | None,
    pooling: str | None,
    max_tokens: int | None,
    sae: str | None,
    codes: str | None,
    adapter: str | None,
    patch_at: str | None,
    method: str | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    device_map: str | None,
    max_pixels: int | None,
    attention: str | None,
    batch_size: int | None,
    skip_bad: bool | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Patch MODEL (a folder, a hub id; default: the built-in tiny-mllm) and export it to OUT.

    OUT is then a sentence-transformers model: SentenceTransformer("OUT") loads it, without this
    package. It also holds the patch, the table of all methods on test, a card, and a report to open
    in a browser (report/report.html). A second run does only what is missing.

    \b
    patch-retriever build -o demo
    patch-retriever build --pairs photos/ -o mine
    patch-retriever build org/model --pairs pairs.jsonl --preset paper -o mine
    patch-retriever build --config settings.yaml --seed 1 -o mine
    patch-retriever build --adapter lora -o mine      or later: patch-retriever adapt mine

    PAIRS, 50 at least: a JSON-lines file of {"image": "path.jpg", "text": "what it shows"} (or a
    list of either); a CSV, TSV or Parquet file with such columns; WebDataset shards
    ("shards/{0000..0031}.tar"); datasets:org/name[/config][:split], from the hub or a folder; or a
    folder of any of these, or of pictures with .txt files of the same name.
    """
    from patch_retriever.config import BuildConfig
    from patch_retriever.runs import check_out

    config = BuildConfig.read(
        config_file,
        model=model,
        revision=revision,
        pairs=pairs,
        image_column=image_column,
        text_column=text_column,
        allow_urls=allow_urls,
        preset=preset,
        prompt=prompt,
        pooling=pooling,
        max_tokens=max_tokens,
        sae_from=sae,
        codes=codes,
        **adapter_settings(adapter),
        patch_at=patch_at,
        method=method,
        seed=seed,
        device=device,
        dtype=dtype,
        device_map=_device_map(device_map),
        max_pixels=max_pixels,
        attention=attention,
        batch_size=batch_size,
        skip_bad=skip_bad,
    )
    if dry_run:
        check_out(out)
        click.echo(json.dumps(plan(out, config), indent=1) if as_json else plan_text(out, config))
        return
    run_build(out, config, as_json)


def run_build(out: Path, config: BuildConfig, as_json: bool) -> None:
    """Build, and say what came of it."""
    from patch_retriever.build import build_retriever
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.patch.deep import CODE

    quiet_libraries()
    narrator = Narrator(silent=as_json)
    result = build_retriever(out, config, narrator.say, narrator.progress)
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), **result.report}, indent=1))
        return
    narrator.say("done")
    click.echo(result.table)
    card, report = result.folder / "README.md", result.folder / "report" / "report.html"
    with_code = (result.folder / CODE.name).is_file()
    if result.report["sae_problem"]:
        click.echo(f"\nnothing was made of concepts: {result.report['sae_problem']}")
    flag = ", trust_remote_code=True" if with_code else ""
    loads = f'SentenceTransformer("{result.folder}"{flag}) loads it'
    click.echo(f"\n{loads}; the card is {card}, the report {report}")


def adapter_settings(said: str | None) -> dict[str, Any]:
    """Settings of a build by what `--adapter` says: a method to train by, or a folder."""
    from patch_retriever.adapters.settings import METHODS

    if said is None:
        return {}
    return {"adapter": {"method": said}} if said in METHODS else {"adapter_from": said}


def _device_map(said: str | None) -> str | dict[str, Any] | None:
    """A device map as transformers takes it: a word, or a JSON object of parts and devices."""
    if said is None or not said.lstrip().startswith("{"):
        return said
    try:
        return dict(json.loads(said))
    except ValueError:
        raise click.BadParameter(f"{said!r}: not a JSON object of parts and devices") from None


def plan(out: Path, config: BuildConfig) -> dict[str, Any]:
    """What a build would do, as JSON values."""
    from patch_retriever.backbones.load import BUILT_IN, built_in_model, check_folder
    from patch_retriever.data import SCENES, pairs_reading
    from patch_retriever.retrieval.readers.pairs import read_pairs
    from patch_retriever.runs import is_ours

    folder = built_in_model() if config.model == BUILT_IN else Path(config.model)
    check_folder(str(folder) if config.model == BUILT_IN else config.model, config.revision)
    sae = None
    if config.sae_from is not None:
        from patch_retriever.sae.formats import load_sae

        sae = load_sae(config.sae_from)
    pairs, n_pairs = None, 0
    if config.pairs != SCENES:
        read = read_pairs(config.pairs, config.skip_bad, reading=pairs_reading(config))
        n_pairs = len(read.pairs)
        pairs = {"usable": len(read.pairs), "left out": list(read.skipped)}
    takes = None
    if (folder / "config.json").is_file():
        from patch_retriever.plan.of_build import plan_of

        takes = plan_of(config, n_pairs, sae)
    finished = [p.parent.name for p in sorted((out / "run").glob("*/done.json"))]
    return {
        "out": str(out),
        "exists": is_ours(out),
        "finished stages": finished,
        "model": str(folder),
        "model found": (folder / "config.json").is_file(),
        "pairs": pairs,
        "takes": takes,
        "settings": config.model_dump(),
    }


def plan_text(out: Path, config: BuildConfig) -> str:
    """The plan for a terminal."""
    values = plan(out, config)
    lines = [f"would build {values['model']} into {out}"]
    if not values["model found"]:
        lines.append("  the model is not on this machine: it would be looked up on the hub")
    if values["pairs"]:
        bad = values["pairs"]["left out"]
        lines.append(f"  {values['pairs']['usable']} usable pairs, {len(bad)} left out")
        lines += [f"    {line}" for line in bad]
    if values["takes"]:
        from patch_retriever.plan import plan_lines

        lines += plan_lines(values["takes"])
    lines.append(f"  stages finished there: {', '.join(values['finished stages']) or 'none'}")
    lines += [f"  {key}: {value}" for key, value in values["settings"].items()]
    return "\n".join(lines)
