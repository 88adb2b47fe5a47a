"""`patch-retriever export`."""

from __future__ import annotations

from pathlib import Path

import click

from patch_retriever.cli import options
from patch_retriever.cli.build import run_build


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@options.method
@options.out_folder
@options.as_json
def export(run: Path, method: str | None, out: Path, as_json: bool) -> None:
    """Export another row of the table of RUN (what `build` made) to OUT.

    The row is exported in the setting that was chosen for it: checked, published and described like
    the one that held-out queries chose, which the card and the table name beside it. Nothing is
    trained, collected or chosen again: OUT shares the finished stages of RUN, which stays as it is.
    An adapter of RUN comes along; its rows have ids that begin with `adapter`. Without --method OUT
    gets the row that held-out queries chose.

    \b
    patch-retriever export demo --method cca -o demo-cca
    patch-retriever export demo --method concepts -o demo-concepts
    """
    from patch_retriever.config import BuildConfig
    from patch_retriever.runs import MARKER, check_finished, check_out, share_stages
    from patch_retriever.stages.fit import ADAPTED, read_selection
    from patch_retriever.stages.picking import find

    check_finished(run)
    check_out(out)
    config = BuildConfig.read(run / MARKER).model_copy(update={"method": method})
    if method is not None:  # a wrong id is said before anything is done
        stages = ["select", f"select{ADAPTED}"] if config.with_adapter else ["select"]
        find([read_selection(run / "run" / stage) for stage in stages], method)
    if out.resolve() != run.resolve():
        share_stages(run / "run", out / "run")
    run_build(out, config, as_json)
