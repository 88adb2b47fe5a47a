"""The analysis of a finished build: every figure and table, each done once, and a README."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patch_retriever
from patch_retriever.analysis import catalogue
from patch_retriever.analysis.concepts import (
    concentration_figure,
    modality_figure,
    overlap_table,
)
from patch_retriever.analysis.exhibit import RESULT, Exhibit, section
from patch_retriever.analysis.finished import Finished, check_backbone, open_build, with_sae
from patch_retriever.analysis.geometry import beta_figure, removal_table, whitening_table
from patch_retriever.analysis.pairs import pairs_curve
from patch_retriever.analysis.readouts import (
    all_prompts,
    layer_figure,
    pooling_table,
    role_figure,
    swept_prompts,
)
from patch_retriever.analysis.removal import removal_curve
from patch_retriever.analysis.views import Outcomes, judge_views, load_outcomes, views_of
from patch_retriever.backbones.adapter import merge
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import Prompt
from patch_retriever.errors import UserError
from patch_retriever.files import write, write_json, write_text
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.runs import Run

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

MARKER = "analysis.json"
"""The file that says that a folder was made by `analyze`."""

OF_CONCEPTS: dict[str, Callable[[Finished, Progress], Exhibit]] = {
    "fig2": modality_figure,
    "fig3": concentration_figure,
    "table1": overlap_table,
    "table2": removal_table,
    "fig6": beta_figure,
    "table8": whitening_table,
    "removal-curve": removal_curve,
    "pairs-curve": pairs_curve,
}
"""Made from what the build left."""

OF_READOUTS: dict[
    str,
    tuple[
        Callable[[Finished, Mapping[str, Outcomes]], Exhibit],
        Callable[[Finished], dict[str, Prompt]],
    ],
] = {
    "fig4": (role_figure, swept_prompts),
    "fig5": (layer_figure, swept_prompts),
    "table5": (pooling_table, all_prompts),
}
"""Made from the backbone, run once under each of some prompts."""


def analyze_build(
    build: Path | str,
    out: Path | str,
    only: Sequence[str] = tuple(catalogue.CATALOGUE),
    sae: str | None = None,
    device: str | None = None,
    say: Say = silent,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write figures and tables about a finished `build` into `out`; what is finished there, made
    of the same build, is not done again.

    Args:
        build: a folder that `build_retriever` made.
        out: folder to write: `NAME.csv`, `NAME.svg` and a `README.md` that shows them all.
        only: names of the catalogue.
        sae: somebody's SAE in place of the build's own, a folder or a hub id.
        device: torch device; the build's if None.

    Returns:
        For every name its files, its summary (rows) and a note on what is missing.

    Raises:
        UserError: the build has not finished, the SAE does not fit, or `out` holds something else.
    """
    folder, out = Path(build), Path(out)
    found = open_build(folder)
    made_of = {"build": str(folder.resolve()), "sae": sae}
    _check_out(out, made_of)
    transformer = cache(lambda: _backbone(folder, found, device))
    with Run(out / "run", say) as run:
        if sae is not None:
            found = with_sae(run, found, folder, sae, transformer(), progress)
        write_json(out / MARKER, made_of)
        for name in only:
            if name in OF_CONCEPTS:
                made = _of_concepts(run, name, found, progress)
            else:
                made = _of_readouts(run, name, found, transformer, progress)
            for file in _result(made)["files"]:
                write(out / file, partial(shutil.copyfile, made / file))
        results = _results(out / "run", found.fingerprint)
        write_text(
            out / "README.md",
            catalogue.readme([(name, section(values)) for name, values in results.items()]),
        )
    return {name: results[name] for name in only}


def _of_concepts(run: Run, name: str, build: Finished, progress: Progress) -> Path:
    def work(folder: Path) -> None:
        OF_CONCEPTS[name](build, progress).save(name, folder, build.fingerprint)

    return run.stage(name, work, build=build.fingerprint, version=patch_retriever.__version__)


def _of_readouts(
    run: Run,
    name: str,
    build: Finished,
    transformer: Callable[[], Transformer],
    progress: Progress,
) -> Path:
    make, prompts_of = OF_READOUTS[name]
    judged = {
        prompt.name: _of_prompt(run, prompt, build, transformer, progress)
        for prompt in prompts_of(build).values()
    }

    def work(folder: Path) -> None:
        outcomes = {prompt: load_outcomes(path) for prompt, path in judged.items()}
        make(build, outcomes).save(name, folder, build.fingerprint)

    after = tuple(f"prompt-{prompt}" for prompt in judged)
    return run.stage(
        name, work, after=after, build=build.fingerprint, version=patch_retriever.__version__
    )


def _of_prompt(
    run: Run,
    prompt: Prompt,
    build: Finished,
    transformer: Callable[[], Transformer],
    progress: Progress,
) -> Path:
    """Outcomes of all views of a prompt, which several figures share."""

    def work(folder: Path) -> None:
        views = views_of(transformer(), prompt.name in swept_prompts(build))
        batch_size = build.config.batch_size
        judge_views(transformer(), build.data, prompt, views, batch_size, folder, progress)

    return run.stage(f"prompt-{prompt.name}", work, build=build.fingerprint)


def _backbone(folder: Path, build: Finished, device: str | None) -> Transformer:
    """The backbone as the export holds it, since the build's own model may lie elsewhere by now;
    that one, with the adapter if there is one, where the export ends the decoder early.

    Raises:
        UserError: it is not there, or it is another.
    """
    check_backbone(folder)
    config, whole = build.config, build.readout.cut is None
    transformer = load_backbone(
        str(folder) if whole else config.model,
        config.dtype,
        device or config.device,
        None if whole else config.revision,
        device_map=None if device else config.device_map,
        max_pixels=None if whole else config.max_pixels,
        attention=config.attention,
    )
    if build.adapted and not whole:
        merge(transformer, folder / "run" / "adapter")
    return transformer


def _results(run: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """What is finished and made of this build, in the catalogue's order."""
    found = {}
    for name in catalogue.CATALOGUE:
        with suppress(OSError, ValueError):  # not made yet, or damaged: it is made when asked for
            values = _result(run / name)
            if values.pop("of") == fingerprint:
                found[name] = values
    return found


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text())


def _check_out(out: Path, made_of: dict[str, str | None]) -> None:
    """Refuse to write into a folder that holds something else, another analysis included."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; name a folder to write to")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MARKER not in names and not names <= {"run"}:  # "run" alone: stopped before the marker
        raise UserError(f"{out}: not empty and not made by `analyze`; name another folder")
    if MARKER not in names:
        return
    try:
        before = json.loads((out / MARKER).read_text())
    except (OSError, ValueError):
        raise UserError(f"{out / MARKER}: damaged; name another folder") from None
    if before != made_of:
        raise UserError(
            f"{out}: holds the analysis of another build or SAE ({before}); name another folder"
        )
