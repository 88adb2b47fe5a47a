"""The main job: from pairs to an exported, proven retriever. Readable from top to bottom.

    pairs -> backbone -> collect -> train SAE -> score -> select -> export -> evaluate -> report
                                                            |  ^
                                                            v  |
                                                          adapter (if it is wanted)

Every stage leaves a finished, hashed result in OUT/run and reads its inputs from there, so that a
stopped build goes on where it stood and ends with the same bytes as an unbroken one.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.activations.collect import collect_tokens
from patch_retriever.adapters.targets import target_modules
from patch_retriever.backbones.adapter import check_adapter, check_fits
from patch_retriever.backbones.cut import cut_at
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.load import BUILT_IN, built_in_model, load_backbone, pinned
from patch_retriever.backbones.placement import device_of
from patch_retriever.backbones.readout import layer_number
from patch_retriever.config import BuildConfig
from patch_retriever.data import (
    SCENES,
    Data,
    pairs_data,
    pairs_reading,
    prepare_pairs,
    scenes_data,
)
from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, value_hash, write_json
from patch_retriever.patch.fit import fitting_device
from patch_retriever.patch.methods import methods
from patch_retriever.patch.methods.adapted import is_refit
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.publish import export, publish
from patch_retriever.report.page import write_report
from patch_retriever.retrieval.readers.pairs import pairs_fingerprint
from patch_retriever.runs import MARKER, Run, check_out, is_ours
from patch_retriever.sae.formats import load_sae
from patch_retriever.sae.settings import MOST_TOKENS
from patch_retriever.stages.adapter import fit_adapted
from patch_retriever.stages.evaluation import evaluate_on_test, write_table
from patch_retriever.stages.fit import best, fit
from patch_retriever.stages.picking import pick
from patch_retriever.stages.readout import choose_readout, kept_tokens, load_readout
from patch_retriever.stages.sae import check_width, learn_concepts

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer


@dataclass(frozen=True)
class BuildResult:
    """What a build made: the export's folder and the table as shown in a terminal and as JSON."""

    folder: Path
    table: str
    report: dict[str, Any]


def build_retriever(
    out: Path | str,
    config: BuildConfig | None = None,
    say: Say = silent,
    progress: Progress = no_progress,
    **settings: Any,
) -> BuildResult:
    """Build a patched retriever into `out`, which `SentenceTransformer(out)` then loads.

    Args:
        out: folder to write; what an earlier build finished there is not done again.
        config: all settings; or name some as keywords (`model=`, `pairs=`, `preset=`, `seed=`).
        say: called with a line at the start of every stage.
        progress: wraps an iterable of a known number of steps, to show progress.

    Raises:
        UserError: an input is wrong; nothing that is finished is lost.
    """
    config = config or BuildConfig.read(None, **settings)
    out = Path(out)
    check_out(out)
    if is_ours(Path(config.model)):
        raise UserError(
            f"{config.model}: patched already; build from the model that it was made of"
        )
    # a wrong SAE or adapter is said before anything is computed
    given = None if config.sae_from is None else load_sae(config.sae_from)
    if config.adapter_from is not None:
        check_adapter(Path(config.adapter_from))
    # a branch may move while a build stands still; its commit is what everything is made of
    config = config.model_copy(update={"revision": pinned(config.model, config.revision)})
    asked: dict[str, Any] = {"max_pixels": config.max_pixels, "attention": config.attention}
    tried: dict[str, Any] = {
        "prompt": config.prompt and asdict(config.prompt),
        "pooling": config.pooling,
        "max_tokens": config.max_tokens,
        "patch_at": config.patch_at,
    }
    transformer = load_backbone(
        config.model,
        config.dtype,
        config.device,
        config.revision,
        device_map=config.device_map,
        **asked,
    )
    if config.patch_at is not None:
        check_layer(transformer, config.patch_at)
    if given is not None:
        check_width(given, transformer.get_embedding_dimension(), str(config.sae_from))
    if config.adapter is not None and config.adapter_from is None:
        target_modules(transformer.model, config.adapter)
    with Run(out / "run", say) as run:
        write_json(out / MARKER, config.model_dump())
        data = _data(run, config, progress)
        readouts = run.stage(
            "readout",
            lambda folder: choose_readout(transformer, data, config, folder, progress),
            after=("data",),
            model=model_fingerprint(config.model, config.revision),
            dtype=str(transformer.model.dtype).removeprefix("torch."),
            preset=config.preset,
            **{option: value for option, value in (asked | tried).items() if value is not None},
        )
        readout, kept = load_readout(readouts), kept_tokens(readouts, data)
        say(f"readout: {readout.name}")
        whole, transformer = transformer, cut_at(transformer, readout.cut)
        if config.adapter_from is not None:  # it was trained on the model as the readout cuts it
            check_fits(transformer, Path(config.adapter_from))
        at = config.patch_at or readout.site  # where the SAE is trained and concepts subtracted
        tokens_wanted = max(MOST_TOKENS, (config.sae.steps or 0) * config.sae.batch_size)
        store = run.stage(
            "collect",
            lambda folder: collect_tokens(
                transformer,
                data.splits["calibration"].items,
                replace(readout, site=at),
                folder,
                config.batch_size,
                progress,
                data.splits["calibration"].pairs(("t->i", "i->t")).tolist(),
                tokens_wanted,
                config.seed,
                run.key("collect"),
                kept,
            ),
            after=("readout",),
            tokens=tokens_wanted,
        )
        sae = run.stage(
            "sae",
            lambda folder: learn_concepts(
                store,
                replace(readout, site=at),
                config,
                folder,
                progress,
                fitting_device(device_of(transformer)),
            ),
            after=("collect",),
            settings=asdict(config.sae),
            given=config.sae_from and sae_fingerprint(config.sae_from),
        )
        fits = [fit(run, transformer, data, readout, sae, config, methods, progress, kept=kept)]
        if config.with_adapter:
            fits.append(
                fit_adapted(run, transformer, data, readout, sae, fits[0], config, say, progress)
            )
        chosen = preferred = best(fits)
        patch, stage, exported_id = chosen.selected / "patch", chosen.stage, chosen.choice["id"]
        if config.method is not None:
            picked = pick(fits, config.method)
            chosen, stage, exported_id = picked.fit, "pick", picked.choice["id"]
            instead_of = preferred.choice["method"]
            folder = run.stage(
                "pick",
                lambda folder: picked.save(readout, instead_of, folder),
                after=(chosen.stage, preferred.stage),
                method=config.method,
            )
            patch = folder / "patch"
        separate = chosen is not fits[0] and not config.adapter_settings.merge
        with nullcontext() if separate else chosen.weights:
            exported = run.stage(
                "export",
                lambda folder: export(
                    transformer,
                    readout,
                    patch,
                    data,
                    folder,
                    run.folder / "adapter" if separate else None,
                ),
                after=(stage,),
                **({"separate": True} if separate else {}),
            )
        shown = exported_id == chosen.choice["id"] or not is_refit(exported_id)
        also = None if shown else exported_id
        outcomes = run.stage(
            "test",
            lambda folder: evaluate_on_test(fits, whole, data, config, folder, progress, also),
            after=tuple(one.stage for one in fits),
            **({} if also is None else {"also": also}),
        )
        evaluated = run.stage(
            "evaluate",
            lambda folder: write_table(outcomes, fits, preferred, exported_id, config.seed, folder),
            after=("test", "export"),
        )
        with chosen.weights:
            reported = run.stage(
                "report",
                lambda folder: write_report(
                    transformer, data, config, run.folder, folder, patch, chosen is not fits[0]
                ),
                after=("evaluate",),
                model=config.model,
            )
        publish(out, chosen, patch, store, exported, evaluated, readouts, reported, data, config)
    report = json.loads((evaluated / "table.json").read_text())
    return BuildResult(out, (evaluated / "table.txt").read_text().rstrip(), report)


def check_layer(transformer: Transformer, site: str) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        UserError: it has none of that number.
    """
    n = n_layers(transformer.model)
    if layer_number(site) >= n:
        raise UserError(f"patch_at {site}: the model's layers are layers.0 to layers.{n - 1}")


def _data(run: Run, config: BuildConfig, progress: Progress) -> Data:
    """The three splits; a user's pairs are read and checked once."""
    if config.pairs == SCENES:
        sizes = config.scenes.model_dump()
        run.stage(
            "data",
            lambda folder: write_json(folder / "scenes.json", sizes),
            seed=config.seed,
            sizes=sizes,
        )
        return scenes_data(sizes, config.seed)
    folder = run.stage(
        "data",
        lambda folder: prepare_pairs(config, folder, progress),
        pairs=str(Path(config.pairs)),
        files=pairs_fingerprint(config.pairs, pairs_reading(config)),
        seed=config.seed,
        skip_bad=config.skip_bad,
    )
    return pairs_data(folder, config.model == BUILT_IN)


def model_fingerprint(name: str, commit: str | None = None) -> str:
    """Changes when a local model's files change; a hub id stands for itself at its commit."""
    folder = built_in_model() if name == BUILT_IN else Path(name)
    return _fingerprint(
        folder, f"{name}@{commit}" if commit else name, (".safetensors", ".json", ".jinja")
    )


def sae_fingerprint(name: str) -> str:
    """Changes when a local SAE's files change; a hub id stands for itself."""
    return _fingerprint(Path(name), name, (".safetensors", ".json", ".pt"))


def _fingerprint(path: Path, name: str, suffixes: tuple[str, ...]) -> str:
    if not path.exists():
        return name
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in suffixes)
    return value_hash([[p.name, file_hash(p)] for p in files])
