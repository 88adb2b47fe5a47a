"""Finished models side by side on retrieval tasks, as anyone would run them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from patch_retriever.ahead import WORKERS
from patch_retriever.errors import UserError
from patch_retriever.hub import is_hub_id
from patch_retriever.patch.artefact import CONFIG
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.retrieval.comparison.baselines import Baseline, baselines
from patch_retriever.retrieval.comparison.bench import Bench
from patch_retriever.retrieval.comparison.result import Comparison, Row, Settings
from patch_retriever.retrieval.comparison.trial import Trial
from patch_retriever.retrieval.encoder import Encoder
from patch_retriever.retrieval.index.factory import check_factory
from patch_retriever.retrieval.load import BASE, check_model, load_encoder
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.runs import MARKER, is_ours


def build_settings(models: Sequence[str]) -> dict[str, Any]:
    """The settings of the first of `models` that `build` made; {} where there is none."""
    for name in models:
        folder = Path(name.removesuffix(BASE))
        if is_ours(folder):
            settings: dict[str, Any] = json.loads((folder / MARKER).read_text())
            return settings
    return {}


def compare_models(
    names: Sequence[str],
    tasks: Mapping[str, RetrievalTask],
    settings: Settings,
    cache: Path,
    keep: Path | None = None,
    calibration: Sequence[RetrievalTask] = (),
    device: str = "cpu",
    batch_size: int = 64,
    say: Say = silent,
    progress: Progress = no_progress,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    workers: int = WORKERS,
) -> Comparison:
    """Every model on every task; the first is the base.

    Args:
        cache: folder of the embedding stores; what lies there is not encoded again.
        keep: folder for the files of trials; what lies there is not searched again.
        calibration: tasks whose items the deployable baselines take their statistics from.
        revision: of the one hub id among the names: a branch, a tag or a commit.
        trust_remote_code: run the code in models' folders that is not this package's own.

    Raises:
        UserError: a model does not load or does not take a task's items, an item cannot be read,
            or the disk is full. What is encoded and searched by then stays.
    """
    if len(set(names)) < len(names):
        say("a model that is named twice is compared once")
    names = list(dict.fromkeys(names))
    for name in names:
        check_model(name.removesuffix(BASE))
    on_hub = [name for name in names if _is_on_hub(name)]
    if revision is not None and len(on_hub) != 1:
        raise UserError(
            f"a revision is of one hub id, and {len(on_hub)} are named; fetch the others to "
            "folders (`hf download`), or leave it out"
        )
    labels = short_names(names)
    rows: list[Row] = []
    judged: dict[str, RetrievalTask] = {}
    for name in names:
        say(f"{name}: encoding and searching")
        at = revision if name in on_hub else None
        encoder = load_encoder(name, device, at, trust_remote_code, workers=workers)
        if settings.index:
            for task in tasks.values():
                check_factory(settings.index, len(task.candidate_ids), encoder.dimension)
        corrections: list[Baseline | None] = [None]
        if settings.baselines and name == names[0]:
            corrections += baselines(bool(calibration))
        trials: list[dict[str, Trial]] = [{} for _ in corrections]
        with ExitStack() as stack:
            bench = Bench(encoder, settings, cache, batch_size, stack, say, progress)
            for label, task in tasks.items():
                ready = bench.prepare(task)
                judged[label] = ready.task
                for correction, found in zip(corrections, trials, strict=True):
                    found[label] = bench.trial(ready, correction, calibration, keep)
        for correction, found in zip(corrections, trials, strict=True):
            rows.append(_row(name, labels[name], encoder, correction, found))
    return Comparison(judged, tuple(rows), settings)


def _is_on_hub(name: str) -> bool:
    return not name.endswith(BASE) and is_hub_id(name) and not Path(name).exists()


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What tables call models: folders by their last name, where that tells them apart."""
    last = {name: Path(name).name if name.startswith(("/", ".", "~")) else name for name in names}
    return last if len(set(last.values())) == len(last) else {name: name for name in names}


def _row(
    model: str,
    label: str,
    encoder: Encoder,
    correction: Baseline | None,
    trials: dict[str, Trial],
) -> Row:
    if correction is None:
        return Row(label, model, _needs(model), encoder.fingerprint, trials, plain=True)
    called = f"{label} + {correction.name}"
    return Row(called, model, correction.needs, encoder.fingerprint, trials, plain=False)


def _needs(name: str) -> str:
    """What a model needed that `build` made; "" of any other, whose training is not known."""
    path = Path(name.removesuffix(BASE)) / "patch" / CONFIG
    if not path.is_file():
        return ""
    needs = str(json.loads(path.read_text())["about"]["needs"])
    adapted = needs == "training"  # so is the backbone
    return "nothing" if name.endswith(BASE) and not adapted else needs
