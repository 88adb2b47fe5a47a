"""The HTML report of a build: one file that opens anywhere, without network and scripts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

import patch_retriever
from patch_retriever.activations.store import Store, sinks_text
from patch_retriever.backbones.placement import device_of
from patch_retriever.concepts.query import TABLE
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data
from patch_retriever.files import write_text
from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.report.card import operators, verdict
from patch_retriever.report.concept_cards import concept_cards
from patch_retriever.report.figures import (
    Drawn,
    energy_figure,
    modality_figure,
    training_figures,
    validation_curves,
)
from patch_retriever.report.gallery import gallery
from patch_retriever.report.rendering import render
from patch_retriever.report.table import EXPLANATION, NEEDS
from patch_retriever.sae.formats import load_sae
from patch_retriever.stages.features import PatchedFeatures
from patch_retriever.stages.fit import ADAPTED
from patch_retriever.stages.readout import load_readout

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

REPORT = "report.html"


def write_report(
    transformer: Transformer,
    data: Data,
    config: BuildConfig,
    run: Path,
    folder: Path,
    patch_folder: Path,
    adapted: bool = False,
) -> None:
    """Write `report.html` into `folder` from the finished stages of a build under `run`.

    Only the items on the concept cards go through the model again. `patch_folder` holds the
    exported patch; with `adapted` it is one of the adapted model, which `transformer` then is.

    Raises:
        UserError: a picture cannot be read any more.
    """
    table = json.loads((run / "evaluate" / "table.json").read_text())
    end = ADAPTED if adapted else ""
    selection = json.loads((run / "select" / "selection.json").read_text())
    tried = json.loads((run / "readout" / "readout.json").read_text())["scores"]
    metrics = json.loads((run / "sae" / "cfg.json").read_text())["metadata"]["metrics"]
    readout, patch = load_readout(run / "readout"), Patch.load(patch_folder)
    sae = load_sae(run / "sae").to(device_of(transformer))
    scores = pq.read_table(run / f"score{end}" / TABLE)
    cards = concept_cards(
        scores,
        patch,
        data.splits["calibration"],
        transformer,
        replace(readout, site=config.patch_at or readout.site),
        sae,
        config.batch_size,
    )
    unpatched = "features" if config.patch_at is None else "unpatched"
    sides = [
        (
            one,
            PatchedFeatures(run / stage, transformer, data, readout, config.batch_size)(
                "test", one.layers
            ),
        )
        for one, stage in ((Patch(patch.site), unpatched), (patch, unpatched + end))
    ]
    groups = {needs: [row for row in table["rows"] if row["needs"] == needs] for needs in NEEDS}
    page = render(
        "report.html.jinja",
        model=config.model,
        version=patch_retriever.__version__,
        summary=summary(table),
        data=data.about,
        warning=data.warning,
        readout=readout.name,
        readouts=sorted(tried.items(), key=lambda one: -one[1]),
        sinks=sinks_text(Store(run / "collect")),
        sae={"n_concepts": sae.n_concepts, "d_in": sae.d_in, **metrics},
        patch=patch.about,
        operators=operators(patch),
        verdict=verdict(table),
        table=table,
        tasks=[task.name for task in data.splits["test"].tasks],
        groups={needs: rows for needs, rows in groups.items() if rows},
        explanation=EXPLANATION,
        curves=validation_curves(selection["methods"]),
        plots=_concept_figures(run, config),
        training=training_figures(run / "adapter"),
        cards=cards,
        gallery=gallery(
            data.splits["test"],
            *(
                [one.embed(features, role).numpy() for role in (QUERY, DOCUMENT)]
                for one, features in sides
            ),
        ),
    )
    write_text(folder / REPORT, page)


def _concept_figures(run: Path, config: BuildConfig) -> list[Drawn]:
    """Modality and energy of the concepts, before and after the adapter if there is one."""
    when = {"": "", ADAPTED: ", after the adapter"} if config.with_adapter else {"": ""}
    figures = []
    for end, said in when.items():
        scores = pq.read_table(run / f"score{end}" / TABLE)
        energy_c, modality_c = scores["energy"].to_numpy(), scores["modality"].to_numpy()
        figures += [modality_figure(modality_c, energy_c, said), energy_figure(energy_c, said)]
    return figures


def summary(table: dict[str, Any]) -> str:
    """The result in a sentence (`table` as in table.json)."""
    base, exported = (
        next(row for row in table["rows"] if row["id"] == table[name])
        for name in ("base_id", "exported_id")
    )
    if base is exported:
        return (
            "No patch was better than the base on held-out queries by more than chance; it scores "
            f"{_score(base)}."
        )
    d = exported["score_minus_base"]
    return (
        f"On test the exported patch ({exported['method']}) scores {_score(exported)}, base "
        f"{_score(base)}: a difference of {100 * d['mean']:+.1f} "
        f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]."
    )


def _score(row: dict[str, Any]) -> str:
    return f"{100 * row['test_score']:.1f}"
