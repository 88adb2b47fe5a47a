"""The stage that trains an adapter through the selected patch, or takes a given one."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from patch_retriever.adapters.batches import captions_of, check_apart
from patch_retriever.adapters.checkpoint import AdapterCheckpoint
from patch_retriever.adapters.forward import PatchedForward
from patch_retriever.adapters.losses import ConceptGroups
from patch_retriever.adapters.training import AdapterTrainer
from patch_retriever.backbones.adapter import (
    CONFIG,
    WEIGHTS,
    Merged,
    check_adapter,
    copy_adapter,
    relative_base,
    save_adapter,
)
from patch_retriever.backbones.load import BUILT_IN, built_in_model
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import Readout
from patch_retriever.concepts.query import TABLE
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data, pairs_reading
from patch_retriever.files import file_hash, write_json
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.methods.adapted import adapted_methods
from patch_retriever.progress import Progress, Say
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.pairs import pairs_collection
from patch_retriever.retrieval.readers.pairs import pairs_fingerprint, read_pairs
from patch_retriever.runs import Run
from patch_retriever.sae.formats import load_sae
from patch_retriever.stages.fit import Fit, fit

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

LOG = "training.json"
"""The looks of a training, in an adapter's folder."""


def fit_adapted(
    run: Run,
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae: Path,
    base: Fit,
    config: BuildConfig,
    say: Say,
    progress: Progress,
) -> Fit:
    """Train an adapter through the patch that `base` chose, or take a given one, and fit every
    method anew on the adapted model.

    Raises:
        UserError: an input is wrong, or memory runs out.
    """
    settings, own = config.adapter_settings, None
    if config.adapter_from is not None:
        source, model = Path(config.adapter_from), base_of(config)
        adapter = run.stage(
            "adapter",
            lambda folder: adopt_adapter(source, model, folder),
            after=(base.stage,),
            given=adapter_fingerprint(source),
        )
    else:
        if settings.with_patch:
            own = Patch.load(base.selected / "patch")
        pairs = settings.pairs
        adapter = run.stage(
            "adapter",
            lambda folder: learn_adapter(
                transformer,
                data,
                readout,
                sae,
                base.concepts,
                own or Patch(readout.site),
                config,
                folder,
                AdapterCheckpoint(run.folder / "adapter.training", run.key("adapter")),
                say,
                progress,
            ),
            after=(base.stage,),
            settings={k: v for k, v in asdict(settings).items() if k != "merge"},
            files=pairs and pairs_fingerprint(pairs, pairs_reading(config)),
        )
    anew = partial(adapted_methods, trained_with=own)
    weights = Merged(transformer, adapter)
    return fit(run, transformer, data, readout, sae, config, anew, progress, weights)


def learn_adapter(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae_folder: Path,
    concepts: Path,
    patch: Patch,
    config: BuildConfig,
    folder: Path,
    checkpoint: AdapterCheckpoint,
    say: Say,
    progress: Progress,
) -> None:
    """Train an adapter through `patch` into `folder`, in peft's layout.

    Raises:
        UserError: there is nothing to adapt or to train on, memory runs out, or the pairs hold
            pictures of the validation or test split.
    """
    settings = config.adapter_settings
    training = training_collection(data, config, progress)
    energy_of = None
    if settings.rebalancing:
        groups = ConceptGroups.of(load_sae(sae_folder), ConceptTable.load(concepts / TABLE))
        energy_of = groups.to(device_of(transformer)).energy
    trainer = AdapterTrainer(
        PatchedForward(transformer, readout, patch, energy_of, config.patch_at),
        training,
        data.splits["validation"],
        captions_of(training, settings.captions),
        settings,
        config.seed if settings.seed is None else settings.seed,
        config.batch_size,
        progress,
    )
    try:
        trained = trainer.train(checkpoint, lambda look: say(look.to_text()))
        trainer.keep(trained.best_weights)
        about = {"settings": asdict(settings), "readout": readout.to_json(), "patch": patch.why}
        save_adapter(trainer.peft_model, folder, base_of(config), about)
    finally:
        trainer.close()
    write_json(folder / LOG, trained.to_json())
    checkpoint.remove()


def adopt_adapter(source: Path, base: str, folder: Path) -> None:
    """Take an adapter that was trained before.

    Raises:
        UserError: there is none, or it is damaged.
    """
    about = check_adapter(source)
    copy_adapter(source, folder, relative_base(base, folder), {**about, "from": str(source)})


def base_of(config: BuildConfig) -> str:
    """The folder or hub id of a build's model."""
    return str(built_in_model()) if config.model == BUILT_IN else config.model


def training_collection(data: Data, config: BuildConfig, progress: Progress) -> Collection:
    """The pairs to train on: those given, or the calibration split's.

    Raises:
        UserError: they cannot be read, or hold pictures of the validation or test split.
    """
    source = config.adapter_settings.pairs
    if source is None:
        return data.splits["calibration"]
    read = read_pairs(source, config.skip_bad, progress, pairs_reading(config))
    training = pairs_collection("training", read.pairs)
    check_apart(training, [data.splits["validation"], data.splits["test"]])
    return training


def adapter_fingerprint(source: Path) -> list[str]:
    """Changes when an adapter's files do.

    Raises:
        UserError: there is no adapter, or it is damaged.
    """
    check_adapter(source)
    return [file_hash(source / name) for name in (CONFIG, WEIGHTS)]
