"""From a model's weights to its best patch: features, scores, selection. Once for the backbone as
it is and, where there is an adapter, once more for the adapted one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.activations.kept import KeptTokens
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import Readout
from patch_retriever.config import MOST_ITEMS, BuildConfig
from patch_retriever.data import SPLITS, Data
from patch_retriever.errors import UserError
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.fit import fitting_device
from patch_retriever.patch.methods import Method
from patch_retriever.progress import Progress
from patch_retriever.runs import Run
from patch_retriever.stages.features import (
    NO_CHANGE,
    PatchedFeatures,
    SavedFeatures,
    collect_splits,
    collect_unpatched,
)
from patch_retriever.stages.scoring import score
from patch_retriever.stages.selection import load_calibration, select
from patch_retriever.stages.trials import fitted_splits, trials

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

ADAPTED = "-adapted"
"""How the stages of an adapted model end."""


@dataclass(frozen=True)
class Fit:
    """What the stages left for one set of weights (the context that the backbone has them in)."""

    weights: AbstractContextManager[object]
    features: SavedFeatures
    concepts: Path
    calibration: Calibration
    methods: tuple[Method, ...]
    selected: Path
    stage: str
    """The name of the last of the stages."""

    @property
    def selection(self) -> dict[str, Any]:
        """Every method's choice on held-out queries, as in `selection.json`."""
        return read_selection(self.selected)

    @property
    def choice(self) -> dict[str, Any]:
        """The method that was chosen on held-out queries, its setting and its score."""
        found = self.selection
        return next(m for m in found["methods"] if m["id"] == found["exported_id"])


def read_selection(folder: Path) -> dict[str, Any]:
    """What the stage that selects left in its folder.

    Raises:
        UserError: it is missing, or from an older version.
    """
    path = folder / "selection.json"
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); run the same build again") from None
    if "exported_id" not in found:
        raise UserError(f"{path}: from an older version; run the same build again")
    return found


def best(fits: Sequence[Fit]) -> Fit:
    """The one whose choice scores best on validation; the first of equals."""
    return max(fits, key=lambda one: one.choice["validation_score"])


def fit(
    run: Run,
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae: Path,
    config: BuildConfig,
    methods: Callable[[Calibration], Iterator[Method]],
    progress: Progress,
    adapter: AbstractContextManager[object] | None = None,
    kept: KeptTokens | None = None,
) -> Fit:
    """Run the stages, or take what they left; with an `adapter` those whose names end so. `kept`
    are tokens of the backbone as it is."""
    weights, end = (NO_CHANGE, "") if adapter is None else (adapter, ADAPTED)
    trained = () if adapter is None else ("adapter",)
    # where the SAE is trained and concepts are subtracted
    at = replace(readout, site=config.patch_at or readout.site)
    splits = SPLITS if config.patch_at is None else SPLITS[:1]  # else for scores alone

    def stage(name: str, work: Callable[[Path], None], *after: str, **inputs: Any) -> Path:
        def in_place(folder: Path) -> None:
            with weights:
                work(folder)

        return run.stage(name + end, in_place, after, **inputs)

    features = stage(
        "features",
        lambda folder: collect_splits(
            transformer, data, at, sae, folder, config.batch_size, progress, splits, kept
        ),
        "sae",
        *trained,
    )
    unpatched = features
    if config.patch_at is not None:
        unpatched = stage(
            "unpatched",
            lambda folder: collect_unpatched(transformer, data, readout, config.batch_size, folder),
            "readout",
            *trained,
        )
    patched = PatchedFeatures(unpatched, transformer, data, readout, config.batch_size, weights)
    concepts = stage(
        "score",
        lambda folder: score(transformer, data, at, features, sae, config.codes, folder),
        f"features{end}",
        codes=config.codes,
    )
    folds = config.folds_of_choice
    on = fitted_splits(data, folds)
    calibration = load_calibration(
        readout,
        data,
        patched,
        sae,
        concepts,
        config.seed,
        config.patch_at,
        on,
        config.codes,
        fitting_device(device_of(transformer)),
        config.max_calibration_items,
    )
    found, most = tuple(methods(calibration)), config.max_calibration_items

    def choose(folder: Path) -> None:
        held_out = trials(calibration, found, data, patched.of_all, methods, folds, config.codes)
        select(calibration, held_out, readout, folder, progress, found)

    selected = stage(
        "select",
        choose,
        f"score{end}",
        *([] if config.patch_at is None else [f"unpatched{end}"]),
        **({} if most == MOST_ITEMS else {"max_calibration_items": most}),
        folds=folds if len(on) > 1 else 1,
        rules=4,  # raised when choices are made by others, so that they are made again
    )
    return Fit(weights, patched, concepts, calibration, found, selected, f"select{end}")
