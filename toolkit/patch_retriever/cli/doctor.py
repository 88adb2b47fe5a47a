"""`patch-retriever doctor`."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import click


@click.command()
def doctor() -> None:
    """Check this installation: versions, FAISS, devices, the built-in model.

    \b
    patch-retriever doctor

    Exits with 1 if something will not work. Include its output in a bug report.
    """
    from patch_retriever import __version__
    from patch_retriever.errors import UserError

    problems: list[str] = []
    click.echo(
        f"patch-retriever {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    packages = (
        "torch",
        "transformers",
        "sentence-transformers",
        "nnsight",
        "peft",
        "safetensors",
        "scikit-learn",
    )
    for name in packages:
        try:
            click.echo(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install {name}")
    installed = {str(d.metadata["Name"]).lower() for d in metadata.distributions()}
    builds = sorted(name for name in installed if name.startswith("faiss-"))
    click.echo(f"  faiss: {', '.join(builds) or 'none'}")
    if len(builds) != 1:
        problems.append(
            "exactly one FAISS is needed: pip install 'patch-retriever[cpu]', or [gpu] instead"
        )
    try:
        import faiss  # noqa: F401
        import torch
        import transformers.models.llava.modeling_llava  # noqa: F401

        gpus = torch.cuda.device_count()
        click.echo(f"  devices: cpu ({torch.get_num_threads()} threads), {gpus} GPU")
    except Exception as error:  # whatever breaks an import is what we are here to report
        hint = ""
        if "torchvision" in str(error):
            hint = "; this torchvision does not fit this torch: pip uninstall torchvision"
        problems.append(f"import fails: {error!r}{hint}")
    try:
        from patch_retriever.backbones.load import built_in_model

        click.echo(f"  built-in model: {built_in_model()}")
    except UserError as error:
        click.echo(f"  built-in model: not here ({error})")
    for problem in problems:
        click.echo(f"PROBLEM {problem}")
    click.echo("all well" if not problems else f"{len(problems)} problems")
    sys.exit(1 if problems else 0)
