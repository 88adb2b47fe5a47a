"""`patch-retriever doctor`."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from patch_retriever.backbones.readout import PROMPTS
from patch_retriever.cli import options

if TYPE_CHECKING:
    from patch_retriever.activations.inspection import Inspection
    from patch_retriever.activations.sinks import SinkReport

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "nnsight",
    "peft",
    "safetensors",
    "scikit-learn",
)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--pairs", default="scenes", show_default=True, help="Look at MODEL on some of these items."
)
@click.option(
    "--prompt",
    type=click.Choice(list(PROMPTS)),
    default="paper",
    show_default=True,
    help="The prompt that MODEL reads them with.",
)
@options.revision
@options.device
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    default="float32",
    show_default=True,
    help="The dtype that MODEL runs in; auto is that of its files.",
)
@click.option("--max-pixels", type=click.IntRange(1), help="Make no image larger than this.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Items per forward pass; the activations of all layers are in memory at once.",
)
@options.as_json
def doctor(
    model: str | None,
    pairs: str,
    prompt: str,
    revision: str | None,
    device: str,
    dtype: str,
    max_pixels: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Check this installation: versions, FAISS, devices, the built-in model.

    With MODEL (a folder, a hub id, or tiny-mllm) also look at that model: a handful of texts,
    images and both go through it once, and a table shows for every layer how large activations
    are, how many attention sinks there are, where they sit and how large they are, and whether
    float16 would overflow.

    \b
    patch-retriever doctor
    patch-retriever doctor tiny-mllm
    patch-retriever doctor org/model --pairs photos.jsonl --dtype auto

    Exits with 1 if something will not work. Include its output in a bug report.
    """
    found = _installation()
    if not as_json:
        click.echo("\n".join(_installation_lines(found)))
    if model is not None:
        looked = _look(model, pairs, prompt, batch_size, revision, device, dtype, max_pixels)
        found["model"] = {"name": model, **looked.to_json()}
        if not as_json:
            click.echo("\n" + "\n".join(_model_lines(model, looked)))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    sys.exit(1 if found["problems"] else 0)


def _installation() -> dict[str, Any]:
    """Versions, devices, the built-in model, and the problems with them."""
    from patch_retriever import __version__
    from patch_retriever.errors import UserError

    problems: list[str] = []
    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install {name}")
    installed = {str(d.metadata["Name"]).lower() for d in metadata.distributions()}
    builds = sorted(name for name in installed if name.startswith("faiss-"))
    if len(builds) != 1:
        problems.append(
            "exactly one FAISS is needed: pip install 'patch-retriever[cpu]', or [gpu] instead"
        )
    devices = None
    try:
        import faiss  # noqa: F401
        import torch
        import transformers.models.llava.modeling_llava  # noqa: F401

        devices = {"cpu_threads": torch.get_num_threads(), "gpus": torch.cuda.device_count()}
    except Exception as error:  # whatever breaks an import is what we are here to report
        hint = ""
        if "torchvision" in str(error):
            hint = "; this torchvision does not fit this torch: pip uninstall torchvision"
        problems.append(f"import fails: {error!r}{hint}")
    try:
        from patch_retriever.backbones.load import built_in_model

        built_in = str(built_in_model())
    except UserError as error:
        built_in = f"not here ({error})"
    return {
        "patch_retriever": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "faiss": builds,
        "devices": devices,
        "built_in_model": built_in,
        "problems": problems,
    }


def _installation_lines(found: dict[str, Any]) -> list[str]:
    version, python, system = (found[key] for key in ("patch_retriever", "python", "platform"))
    lines = [f"patch-retriever {version}, Python {python}, {system}"]
    lines += [f"  {name} {number}" for name, number in found["packages"].items()]
    lines.append(f"  faiss: {', '.join(found['faiss']) or 'none'}")
    if found["devices"]:
        threads, gpus = found["devices"].values()
        lines.append(f"  devices: cpu ({threads} threads), {gpus} GPU")
    lines.append(f"  built-in model: {found['built_in_model']}")
    problems = found["problems"]
    lines += [f"PROBLEM {problem}" for problem in problems]
    return [*lines, f"{len(problems)} problems" if problems else "all well"]


def _look(
    model: str,
    pairs: str,
    prompt: str,
    batch_size: int,
    revision: str | None,
    device: str,
    dtype: str,
    max_pixels: int | None,
) -> Inspection:
    """A handful of items through the model.

    Raises:
        UserError: the model or the items cannot be read.
    """
    from patch_retriever.activations.inspection import handful, inspect
    from patch_retriever.backbones.load import load_backbone
    from patch_retriever.backbones.readout import PROMPTS
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.data import all_items

    quiet_libraries()
    transformer = load_backbone(model, dtype, device, revision, max_pixels=max_pixels)
    narrator = Narrator(silent=True)
    items = handful(all_items(pairs))
    return inspect(transformer, items, PROMPTS[prompt], batch_size, narrator.progress)


def _model_lines(model: str, looked: Inspection) -> list[str]:
    """What a terminal shows of a model."""
    items = ", ".join(f"{n} {kind}" for kind, n in looked.items.items())
    roles = ", ".join(f"{n:,} {role}" for role, n in looked.roles.items() if n)
    head = [f"{model}: items {items}; tokens {roles}"]
    if looked.image_tokens:
        least, most = looked.image_tokens
        count = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        head.append(f"{count} image tokens an item with images")
    rows: list[tuple[str, ...]] = [
        ("site", "median norm", "largest", "value", "sinks an item", "x median (most)", "sinks are")
    ]
    rows += [_row(site, found) for site, found in looked.sites.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        cells = [cell.rjust(n) for cell, n in zip(middle, widths[1:-1], strict=True)]
        head.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return [*head, *(f"WARNING {line}" for line in looked.warnings)]


def _row(site: str, found: SinkReport) -> tuple[str, ...]:
    """A site's cells: norms, the largest value, and its sinks."""
    norms = (f"{x:,.4g}" for x in (found.median_norm, found.largest_norm, found.largest))
    if not found.sinks:
        return (site, *norms, "0", "-", "-")
    roles = ", ".join(f"{n:,} {role}" for role, n in found.by_role.items() if n)
    dimensions = ", ".join(f"{number} ({share:.0%})" for number, share in found.massive)
    where = f"{found.first:,} first, {found.sinks - found.first:,} elsewhere; {roles}"
    return (
        site,
        *norms,
        f"{found.sinks / found.items:.2f}",
        f"{found.median_ratio:,.3g} ({found.largest_ratio:,.3g})",
        f"{where}; dimension{'s' if len(found.massive) > 1 else ''} {dimensions}",
    )
