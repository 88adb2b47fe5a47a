"""The end of a build: the export, and the folder that users load."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import patch_retriever
from patch_retriever.activations.store import Store, sinks_text
from patch_retriever.backbones.adapter import FOLDER as ADAPTER
from patch_retriever.backbones.readout import Readout
from patch_retriever.concepts.query import ABOUT, TABLE
from patch_retriever.concepts.table import add_selection
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.errors import UserError
from patch_retriever.export import export_patch
from patch_retriever.files import inside, link_or_copy, write, write_json, write_text
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.deep import CODE
from patch_retriever.report.card import loading, model_card, operators, verdict
from patch_retriever.report.page import REPORT
from patch_retriever.report.table import EXPLANATION, setting_text
from patch_retriever.runs import DONE
from patch_retriever.stages.fit import Fit
from patch_retriever.stages.readout import load_readout

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


def export(
    transformer: Transformer,
    readout: Readout,
    patch: Path,
    data: Data,
    folder: Path,
    adapter: Path | None = None,
) -> None:
    """Write the model of the `patch` in a folder and check it in a fresh process; an `adapter` that
    is given stays beside the weights.

    Raises:
        UserError: the export differs from the live model by more than 1e-5 (float32).
    """
    items = data.splits["validation"].items
    golden = [
        i for kind in ("text", "image", "both") for i in [x for x in items if x.kind == kind][:3]
    ]
    export_patch(transformer, readout, Patch.load(patch), folder, golden, adapter)


def publish(
    out: Path,
    chosen: Fit,
    patch_folder: Path,
    store: Path,
    exported: Path,
    evaluated: Path,
    readouts: Path,
    reported: Path,
    data: Data,
    config: BuildConfig,
) -> None:
    """Put the export, the patch, the report and the card into `out`; `modules.json` comes last,
    so that a half-published folder does not load."""
    (out / "modules.json").unlink(missing_ok=True)
    selected, concepts = chosen.selected, chosen.concepts
    sources = {p.relative_to(exported): p for p in exported.rglob("*") if p.is_file()}
    sources |= {Path("patch", p.name): p for p in patch_folder.iterdir()}
    sources |= {Path("report", p.name): p for p in evaluated.iterdir()}
    for path in (selected / "selection.json", concepts / ABOUT, reported / REPORT):
        sources[Path("report", path.name)] = path
    last = sources.pop(Path("modules.json"))
    sources = {name: path for name, path in sources.items() if name.name != DONE}
    table = Path("report", TABLE)
    _remove_what_was_published(out, keep={str(name) for name in (*sources, table)})
    for name, path in sources.items():
        write(out / name, partial(link_or_copy, path))
    patch = Patch.load(patch_folder)
    add_selection(concepts / TABLE, patch.strengths, patch.why, out / table)
    card = _card(out.name, patch, store, exported, evaluated, readouts, data, config)
    write_text(out / "README.md", card)
    write(out / "modules.json", partial(link_or_copy, last))


def _remove_what_was_published(out: Path, keep: set[str]) -> None:
    """Delete what an earlier build with other settings left here, and remember what is ours."""
    record = out / "run" / "published.json"
    try:
        before = set(map(str, json.loads(record.read_text()))) if record.is_file() else set()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{record}: damaged ({error}); delete it and build again") from None
    for path in [inside(out, name, record) for name in before - keep]:
        path.unlink(missing_ok=True)
        if path.parent != out and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    write_json(record, sorted(keep))


def _adapter(config: BuildConfig, separate: bool) -> str:
    """An exported adapter in words."""
    where = "beside the weights, in `adapter/`" if separate else "merged into the weights"
    if config.adapter_from is not None:
        return f"one that was given, {where}"
    settings = config.adapter_settings
    rank = "" if settings.method == "ia3" else f" of rank {settings.rank}"
    return (
        f"{settings.method}{rank}, at most {settings.steps} steps on "
        f"{settings.pairs or 'the calibration pairs'}, {where}"
    )


def _card(
    name: str,
    patch: Patch,
    store: Path,
    exported: Path,
    evaluated: Path,
    readouts: Path,
    data: Data,
    config: BuildConfig,
) -> str:
    """The model card, from the finished stages."""
    report = json.loads((evaluated / "table.json").read_text())
    golden = json.loads((exported / "golden" / "result.json").read_text())
    tried = json.loads((readouts / "readout.json").read_text())["scores"]
    texts = [item.text for item in data.splits["test"].items if item.kind == "text"]
    with_code = (exported / CODE.name).is_file()
    separate = (exported / ADAPTER).is_dir()
    readout = load_readout(readouts)
    return model_card(
        name=name,
        base_model=config.model,
        commit=config.revision,
        version=patch_retriever.__version__,
        example=texts[0],
        readout=readout.name,
        max_tokens=readout.max_tokens,
        prompts=list(readout.prompts),
        instruction=readout.prompt.instruction,
        chosen_how=f"chosen on validation among {len(tried)}" if tried else "the preset's",
        exported=patch.about["method"],
        setting=setting_text(patch.about["setting"]),
        needs=patch.about["needs"],
        picked_instead_of=patch.about.get("picked_instead_of", ""),
        operators=operators(patch),
        loading=loading(with_code, separate),
        sinks=sinks_text(Store(store)),
        adapter=_adapter(config, separate) if patch.about["needs"] == "training" else "",
        with_code=with_code,
        golden=f"{golden['max_abs_diff']:.1g}",
        by_batch=f"{golden['max_abs_diff_by_batch']:.1g}",
        data=data.about,
        warning=data.warning,
        explanation=EXPLANATION,
        table=(evaluated / "table.md").read_text().strip(),
        verdict=verdict(report),
    )
