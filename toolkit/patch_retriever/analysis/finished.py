"""A finished build as what an analysis starts from; with another SAE, if one is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from patch_retriever.analysis.exhibit import Yardstick
from patch_retriever.backbones.load import BUILT_IN
from patch_retriever.backbones.readout import Readout
from patch_retriever.build import sae_fingerprint
from patch_retriever.config import BuildConfig
from patch_retriever.data import SCENES, Data, pairs_data, scenes_data
from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.files import value_hash
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.fit import Statistics
from patch_retriever.patch.operators import Gate
from patch_retriever.progress import Progress
from patch_retriever.retrieval.evaluate import Outcome, evaluate
from patch_retriever.runs import DONE, MARKER, Done, Run, check_finished, damaged, read_done
from patch_retriever.stages.features import SavedFeatures, collect_splits
from patch_retriever.stages.fit import ADAPTED
from patch_retriever.stages.readout import load_readout
from patch_retriever.stages.sae import learn_concepts
from patch_retriever.stages.scoring import score
from patch_retriever.stages.selection import load_calibration

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

_AGAIN = "run the same build again"
_STAGES = ("data", "readout", "sae")
_KNOWN = Gate(torch.tensor([[1.0], [1.0]]), torch.tensor([-0.5, -1.5]), 1.0)
"""A gate that is told the kind of an item: an analysis knows it, and no gate has to be fitted."""


@dataclass(frozen=True)
class Finished:
    """What a build left: its settings, data and readout, and where the results of its stages are.

    `fingerprint` changes when any of them does.
    """

    config: BuildConfig
    data: Data
    readout: Readout
    sae: Path
    features: Path
    concepts: Path
    fingerprint: str
    adapted: bool = False
    """Whether the adapted model was exported."""

    @cached_property
    def calibration(self) -> Calibration:
        """What patches are fitted on.

        Raises:
            UserError: no concept of the SAE fires, so that there is nothing to select from.
        """
        loaded = load_calibration(
            self.readout,
            self.data,
            SavedFeatures(self.features),
            self.sae,
            self.concepts,
            self.config.seed,
        )
        found = replace(loaded, gate=_KNOWN, features=_telling_kinds(loaded.features))
        if not bool((found.concepts.energy > 0).any()):
            raise UserError(
                f"{self.sae}: none of its concepts fires on these items; it is an SAE of other "
                "activations, so take one of this model and site"
            )
        return found

    @cached_property
    def task_statistics(self) -> list[Statistics]:
        """Of calibration's queries and documents, task by task."""
        c = self.calibration
        return [
            Statistics(
                c.features.pooled_nd,
                [torch.tensor(task.queries), torch.tensor(task.documents)],
                "role",
                c.device,
            )
            for task in self.data.splits["calibration"].tasks
        ]

    def split(self, name: str) -> Features:
        """The features of a split."""
        return _telling_kinds(Features.load(self.features / f"{name}.safetensors"))

    @cached_property
    def test(self) -> Features:
        """The features of the test split."""
        return self.split("test")

    @cached_property
    def validation(self) -> Features:
        """The features of the validation split."""
        return self.split("validation")

    @cached_property
    def yardstick(self) -> Yardstick:
        """The build's readout without a patch, on test."""
        base = self.on_test([self.patch()])
        return Yardstick(
            base, f"no patch ({self.readout.name})", self.data.splits["test"], self.config.seed
        )

    def patch(self, *maps: Any) -> Patch:
        """A patch of some maps on the pooled vector."""
        return Patch(self.calibration.site, None, maps, self.calibration.gate)

    def on_test(self, patches: Sequence[Patch]) -> Outcome:
        """The mean outcome of patches on test."""
        return evaluate(patches, self.test, self.data.splits["test"])

    def on_validation(self, patches: Sequence[Patch]) -> Outcome:
        """The mean outcome of patches on validation: for choices only."""
        return evaluate(patches, self.validation, self.data.splits["validation"])


def _telling_kinds(features: Features) -> Features:
    """With the number of the kind in the place of what a gate looks at."""
    return replace(features, mean_nd=features.kinds_n[:, None].float())


def open_build(folder: Path) -> Finished:
    """Read what a finished build left.

    Raises:
        UserError: it is no finished build, or one of its files is damaged.
    """
    check_finished(folder)
    try:
        config = BuildConfig.model_validate(json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError, ValidationError):
        raise UserError(f"{folder / MARKER}: damaged; run the same build again") from None
    if config.patch_at is not None:
        raise UserError(
            f"{folder}: patched at {config.patch_at}, whose effect goes through later layers; "
            "only builds that are patched at the readout are taken apart so far"
        )
    run = folder / "run"
    # the folder's weights are the adapted model's if that was exported
    adapted = Patch.load(folder / "patch").about.get("needs") == "training"
    end = ADAPTED if adapted else ""
    keys = [_check_stage(run / stage) for stage in (*_STAGES, f"features{end}", f"score{end}")]
    if config.pairs == SCENES:
        data = scenes_data(config.scenes.model_dump(), config.seed)
    else:
        data = pairs_data(run / "data", config.model == BUILT_IN)
    return Finished(
        config,
        data,
        load_readout(run / "readout"),
        run / "sae",
        run / f"features{end}",
        run / f"score{end}",
        value_hash(keys),
        adapted,
    )


def check_backbone(folder: Path) -> None:
    """Refuse a folder whose weights are not those that its build was made with.

    Raises:
        UserError: they are another model's.
    """
    exported = _finished(folder / "run" / "export").files
    weights = {name: sha256 for name, sha256 in exported.items() if name.endswith(".safetensors")}
    if path := damaged(folder, weights):
        raise UserError(f"{path}: not the backbone that this run was made with; {_AGAIN}")


def _check_stage(folder: Path) -> str:
    """The key of a finished stage, whose files all have their hash."""
    done = _finished(folder)
    if path := damaged(folder, done.files):
        raise UserError(f"{path}: damaged or missing; {_AGAIN}")
    return done.key


def _finished(folder: Path) -> Done:
    """What a stage left about itself."""
    done = read_done(folder)
    if done is None:
        raise UserError(f"{folder}: not there or not finished; {_AGAIN}")
    return done


def with_sae(
    run: Run,
    build: Finished,
    folder: Path,
    sae: str,
    transformer: Transformer,
    progress: Progress,
) -> Finished:
    """The same build with somebody's SAE in place of its own: codes and scores are made again.

    Raises:
        UserError: it can't be read, or does not fit the site.
    """
    store = folder / "run" / "collect"
    if not (store / DONE).is_file():
        raise UserError(f"{store}: missing; another SAE needs it, run the same build again")
    config = build.config.model_copy(update={"sae_from": sae})
    given = run.stage(
        "sae",
        lambda made: learn_concepts(store, build.readout, config, made, progress),
        build=build.fingerprint,
        given=sae_fingerprint(sae),
    )
    features = run.stage(
        "features",
        lambda made: collect_splits(
            transformer, build.data, build.readout, given, made, config.batch_size, progress
        ),
        after=("sae",),
    )
    concepts = run.stage(
        "score",
        lambda made: score(
            transformer, build.data, build.readout, features, given, config.codes, made
        ),
        after=("features",),
        codes=config.codes,
    )
    return replace(
        build,
        sae=given,
        features=features,
        concepts=concepts,
        fingerprint=value_hash([build.fingerprint, sae_fingerprint(sae)]),
    )
