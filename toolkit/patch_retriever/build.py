"""The main job: from pairs to an exported, proven retriever. Readable from top to bottom.

    pairs -> backbone -> collect -> train SAE -> score -> select -> export -> evaluate

Every stage leaves a finished, hashed result in OUT/run and reads its inputs from there, so that a
stopped build goes on where it stood and ends with the same bytes as an unbroken one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patch_retriever
from patch_retriever.backbones.readout import PAPER_READOUT, Readout, readout_grid
from patch_retriever.config import BuildConfig
from patch_retriever.data import SCENES, SPLITS, Data, fingerprint, pairs_data, prepare_pairs, scenes_data
from patch_retriever.files import file_hash, value_hash, write_json, write_text
from patch_retriever.runs import MARKER, Run, check_out

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor

    from patch_retriever.features import Features
    from patch_retriever.patch.artefact import Patch
    from patch_retriever.patch.methods import Calibration, Method
    from patch_retriever.report.table import Table


@dataclass(frozen=True)
class BuildResult:
    """What a build made: the export's folder and the table as shown in a terminal and as JSON."""

    folder: Path
    table: str
    report: dict[str, Any]


def build_retriever(
    out: Path | str,
    config: BuildConfig | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[..., Any] = lambda steps, total: steps,
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
    with Run(out / "run", say) as run:
        write_json(out / MARKER, config.model_dump())
        data = _data(run, config, progress)
        from patch_retriever.backbones.load import load_backbone

        transformer = load_backbone(config.model, config.dtype, config.device)
        model_key = model_fingerprint(config.model)

        def readout_stage(folder: Path) -> None:
            choose_readout(transformer, data, config, folder, progress)

        stage = run.stage("readout", readout_stage, ("data",), model=model_key, preset=config.preset)
        readouts = json.loads((stage / "readout.json").read_text())
        readout = Readout.from_json(readouts["chosen"])
        say(f"readout: {readout.name}")

        def collect_stage(folder: Path) -> None:
            from patch_retriever.activations.collect import collect_tokens

            items = data.splits["calibration"].items
            collect_tokens(transformer, items, readout, folder, config.batch_size, progress)

        store = run.stage("collect", collect_stage, ("readout",))

        def sae_stage(folder: Path) -> None:
            from patch_retriever.activations.store import Store
            from patch_retriever.sae.train import train_sae

            share = 0.5 if readout.pooling == "lasttoken" else 0.0
            sae, figures = train_sae(Store(store), config.sae, config.seed, share, progress)
            sae.save(folder, figures)

        sae_folder = run.stage("sae", sae_stage, ("collect",), settings=asdict(config.sae))

        def features_stage(folder: Path) -> None:
            collect_splits(transformer, data, readout, sae_folder, folder, config.batch_size, progress)

        features = run.stage("features", features_stage, ("sae",))

        def score_stage(folder: Path) -> None:
            score(data, features, sae_folder, folder)

        concepts = run.stage("score", score_stage, ("features",))
        calibration = load_calibration(readout, data, features, sae_folder, concepts, config.seed)

        def select_stage(folder: Path) -> None:
            select(calibration, data, features, readout, folder, progress)

        selected = run.stage("select", select_stage, ("score",))

        def export_stage(folder: Path) -> None:
            export(transformer, readout, selected, data, folder)

        exported = run.stage("export", export_stage, ("select",))

        def evaluate_stage(folder: Path) -> None:
            table = evaluate_on_test(calibration, transformer, data, features, selected, config, progress)
            write_json(folder / "table.json", table.to_json())
            write_text(folder / "table.md", table.to_markdown() + "\n")
            write_text(folder / "table.txt", table.to_text() + "\n")

        evaluated = run.stage("evaluate", evaluate_stage, ("export",))
        publish(out, exported, selected, evaluated, concepts, readouts, data, config)
    report = json.loads((evaluated / "table.json").read_text())
    return BuildResult(out, (evaluated / "table.txt").read_text().rstrip(), report)


def _data(run: Run, config: BuildConfig, progress: Callable[..., Any]) -> Data:
    """The three splits; a user's pairs are read and checked once."""
    if config.pairs == SCENES:
        sizes = config.scenes.model_dump()
        run.stage("data", lambda folder: write_json(folder / "scenes.json", sizes), seed=config.seed, sizes=sizes)
        return scenes_data(sizes, config.seed)
    source = Path(config.pairs)
    key = fingerprint(source) if source.exists() else None
    folder = run.stage(
        "data",
        lambda folder: prepare_pairs(source, folder, config.seed, config.skip_bad, progress),
        pairs=str(source),
        files=key,
        seed=config.seed,
        skip_bad=config.skip_bad,
    )
    from patch_retriever.backbones.load import BUILT_IN

    return pairs_data(folder, config.model == BUILT_IN)


def model_fingerprint(name: str) -> str:
    """Changes when a local model's files change; a hub id stands for itself."""
    from patch_retriever.backbones.load import BUILT_IN, built_in_model

    folder = built_in_model() if name == BUILT_IN else Path(name)
    if not folder.is_dir():
        return name
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    return value_hash([[p.name, file_hash(p)] for p in files])


def choose_readout(
    transformer: Transformer, data: Data, config: BuildConfig, folder: Path, progress: Callable[..., Any]
) -> None:
    """Try every readout of the grid on validation; writes `readout.json` (all scores, the best)."""
    from patch_retriever.activations.collect import collect_pooled
    from patch_retriever.backbones.families import n_layers
    from patch_retriever.retrieval.evaluate import evaluate_embeddings

    if config.preset == "paper":
        write_json(folder / "readout.json", {"chosen": PAPER_READOUT.to_json(), "scores": {}})
        return
    validation = data.splits["validation"]
    grid = list(readout_grid(n_layers(transformer.model)))
    pooled = collect_pooled(transformer, validation.items, grid, config.batch_size, progress)
    scores = {}
    for readout, pooled_nd in pooled.items():
        unit_nd = _unit(pooled_nd)
        scores[readout] = evaluate_embeddings(unit_nd, unit_nd, validation).score
    best = max(scores, key=lambda readout: scores[readout])
    write_json(
        folder / "readout.json",
        {"chosen": best.to_json(), "scores": {readout.name: s for readout, s in scores.items()}},
    )


def _unit(pooled_nd: Tensor) -> Any:
    import torch

    return torch.nn.functional.normalize(pooled_nd, dim=1).numpy()


def collect_splits(
    transformer: Transformer,
    data: Data,
    readout: Readout,
    sae_folder: Path,
    folder: Path,
    batch_size: int,
    progress: Callable[..., Any],
) -> None:
    """Pooled vectors and pooled codes of every split, one file each."""
    import torch

    from patch_retriever.activations.collect import collect_features
    from patch_retriever.sae.model import SparseAutoencoder

    sae = SparseAutoencoder.load(sae_folder).to(next(transformer.parameters()).device)
    for split in SPLITS:
        collection = data.splits[split]
        kinds_n = torch.from_numpy(collection.kinds())
        found = collect_features(
            transformer, collection.items, readout, sae, kinds_n, batch_size, progress
        )
        found.save(folder / f"{split}.safetensors")


def score(data: Data, features: Path, sae_folder: Path, folder: Path) -> None:
    """Score every concept on calibration; writes `concepts.parquet`."""
    import torch

    from patch_retriever.concepts.scores import score_concepts
    from patch_retriever.features import Features
    from patch_retriever.retrieval.negatives import hard_negatives
    from patch_retriever.sae.model import SparseAutoencoder

    calibration = Features.load(features / "calibration.safetensors")
    collection = data.splits["calibration"]
    crossing = [task for task in collection.tasks if task.direction in ("t->i", "i->t")]
    raw_nd = calibration.pooled_nd
    means_kd = torch.stack([raw_nd[calibration.kinds_n == kind].mean(0) for kind in range(3)])
    centred_nd = raw_nd - means_kd[calibration.kinds_n.long()]
    score_concepts(
        calibration,
        SparseAutoencoder.load(sae_folder).W_dec_cd,
        torch.from_numpy(collection.pairs(("t->i", "i->t"))),
        hard_negatives(raw_nd, crossing),
        hard_negatives(centred_nd, crossing),
    ).save(folder / "concepts.parquet")


def load_calibration(
    readout: Readout, data: Data, features: Path, sae_folder: Path, concepts: Path, seed: int
) -> Calibration:
    """What the methods learn from, and a gate where it holds on validation too."""
    import torch

    from patch_retriever.concepts.scores import ConceptTable
    from patch_retriever.features import Features
    from patch_retriever.patch.fit import fit_gate
    from patch_retriever.patch.methods import Calibration
    from patch_retriever.sae.model import SparseAutoencoder

    found = Features.load(features / "calibration.safetensors")
    held_out = Features.load(features / "validation.safetensors")
    gate = fit_gate(found.mean_nd, found.kinds_n)
    if gate is not None and not bool((gate.kinds(held_out.mean_nd) == held_out.kinds_n).all()):
        gate = None
    collection = data.splits["calibration"]
    queries = sorted({i for task in collection.tasks for i in task.queries})
    documents = sorted({i for task in collection.tasks for i in task.documents})
    directions = dict.fromkeys(task.direction for task in collection.tasks)
    return Calibration(
        readout.site,
        found,
        SparseAutoencoder.load(sae_folder),
        ConceptTable.load(concepts / "concepts.parquet"),
        gate,
        torch.tensor(queries),
        torch.tensor(documents),
        {direction: torch.from_numpy(collection.pairs((direction,))) for direction in directions},
        seed,
    )


def select(
    calibration: Calibration,
    data: Data,
    features: Path,
    readout: Readout,
    folder: Path,
    progress: Callable[..., Any],
) -> None:
    """Every method's best setting on validation, and the best method of all.

    Writes `selection.json` and the best method's patch, with its reasons, under `patch/`.
    """
    from patch_retriever.features import Features
    from patch_retriever.patch.methods import methods
    from patch_retriever.retrieval.evaluate import evaluate

    held_out, collection = Features.load(features / "validation.safetensors"), data.splits["validation"]
    choices: list[dict[str, Any]] = []
    best_patch, best_score = None, -1.0
    found = list(methods(calibration))
    for method in progress(found, len(found)):
        scored = []
        for setting in method.grid:
            patches = method.make(**setting)
            scored.append((evaluate(patches, held_out, collection).score, setting))
            if not method.control and scored[-1][0] > best_score:
                (best_patch,), best_score, chosen = patches, scored[-1][0], len(choices)
        top, setting = max(scored, key=lambda pair: pair[0])
        choices.append(
            {
                "method": method.name,
                "needs": method.needs,
                "control": method.control,
                "setting": setting,
                "validation_score": top,
                "tried": [{"setting": s, "validation_score": v} for v, s in scored],
            }
        )
    assert best_patch is not None
    write_json(folder / "selection.json", {"exported": choices[chosen]["method"], "methods": choices})
    about = _provenance(best_patch, calibration, readout, choices[chosen])
    replace_about(best_patch, about).save(folder / "patch")


def replace_about(patch: Patch, about: dict[str, Any]) -> Patch:
    """The same patch with another `about`."""
    from dataclasses import replace

    return replace(patch, about=about)


def _provenance(
    patch: Patch, calibration: Calibration, readout: Readout, choice: dict[str, Any]
) -> dict[str, Any]:
    """How a patch was made: readout, method, and every concept with strength, reason and scores."""
    concepts = []
    if patch.subtract is not None:
        scores = vars(calibration.concepts)
        for number, strength in zip(patch.subtract.concepts_m.tolist(), patch.subtract.strength_m.tolist(), strict=True):
            entry = {name: float(f"{float(score_c[number]):.6g}") for name, score_c in scores.items()}
            concepts.append({"concept": number, "strength": float(f"{strength:.6g}"), **entry})
    return {
        "made_by": f"patch-retriever {patch_retriever.__version__}",
        "readout": readout.to_json(),
        "method": choice["method"],
        "needs": choice["needs"],
        "setting": choice["setting"],
        "reason": patch.about.get("subtract", ""),
        "concepts": concepts,
    }


def export(
    transformer: Transformer, readout: Readout, selected: Path, data: Data, folder: Path
) -> None:
    """Write the model as stock sentence-transformers modules and check it in a fresh process.

    Raises:
        UserError: the export differs from the live model by more than 1e-5 (float32).
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    from patch_retriever.backbones.load import with_readout
    from patch_retriever.errors import UserError
    from patch_retriever.golden import check_golden, write_golden
    from patch_retriever.patch.artefact import Patch
    from patch_retriever.patch.export import export_modules
    from patch_retriever.retriever import PatchedRetriever

    patch = Patch.load(selected / "patch")
    retriever = PatchedRetriever(with_readout(transformer, readout), patch)
    width = transformer.get_embedding_dimension()
    modules = [transformer, *export_modules(patch, width, readout.pooling)]
    model = SentenceTransformer(modules=modules, device=str(retriever.device))
    try:
        model.save(str(folder), create_model_card=False)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error})") from None
    items = data.splits["validation"].items
    golden = [i for kind in ("text", "image", "both") for i in [x for x in items if x.kind == kind][:3]]
    write_golden(folder, retriever, golden)
    largest = check_golden(folder)
    write_json(folder / "golden" / "result.json", {"max_abs_diff": largest})


def evaluate_on_test(
    calibration: Calibration,
    transformer: Transformer,
    data: Data,
    features: Path,
    selected: Path,
    config: BuildConfig,
    progress: Callable[..., Any],
) -> Table:
    """All methods, each in the setting that validation chose, on the test split."""
    from patch_retriever.activations.collect import collect_pooled
    from patch_retriever.features import Features
    from patch_retriever.patch.methods import methods
    from patch_retriever.report.table import Row, Table
    from patch_retriever.retrieval.evaluate import PairedBootstrap, evaluate, evaluate_embeddings

    selection = json.loads((selected / "selection.json").read_text())
    chosen = {choice["method"]: choice for choice in selection["methods"]}
    collection = data.splits["test"]
    pooled = collect_pooled(transformer, collection.items, [PAPER_READOUT], config.batch_size, progress)
    paper = _unit(pooled[PAPER_READOUT])
    rows = [Row("base, the paper's readout", "nothing", {}, None, False, evaluate_embeddings(paper, paper, collection))]
    test = Features.load(features / "test.safetensors")
    found: Sequence[Method] = list(methods(calibration))
    for method in progress(found, len(found)):
        choice = chosen[method.name]
        outcome = evaluate(method.make(**choice["setting"]), test, collection)
        rows.append(
            Row(method.name, method.needs, choice["setting"], choice["validation_score"], method.control, outcome)
        )
    sizes = {task.name: len(task.queries) for task in collection.tasks}
    return Table(tuple(rows), selection["exported"], PairedBootstrap(sizes, config.seed))


def publish(
    out: Path,
    exported: Path,
    selected: Path,
    evaluated: Path,
    concepts: Path,
    readouts: dict[str, Any],
    data: Data,
    config: BuildConfig,
) -> None:
    """Put the export, the patch, the report and the card into `out`; `modules.json` comes last,
    so that a half-published folder does not load."""
    import shutil

    from patch_retriever.files import write
    from patch_retriever.patch.artefact import Patch
    from patch_retriever.report.card import model_card
    from patch_retriever.report.table import EXPLANATION

    (out / "modules.json").unlink(missing_ok=True)
    files = [(p, out / p.relative_to(exported)) for p in sorted(exported.rglob("*"))]
    files += [(p, out / "patch" / p.name) for p in sorted((selected / "patch").iterdir())]
    files += [(p, out / "report" / p.name) for p in sorted(evaluated.iterdir())]
    files += [(selected / "selection.json", out / "report" / "selection.json")]
    files += [(concepts / "concepts.parquet", out / "report" / "concepts.parquet")]
    files = [(a, b) for a, b in files if a.is_file() and a.name not in ("done.json", "modules.json")]
    for source, target in files:
        write(target, lambda p, source=source: shutil.copyfile(source, p) and None)  # type: ignore[misc]
    report = json.loads((evaluated / "table.json").read_text())
    patch = Patch.load(selected / "patch")
    better = [r["method"] for r in report["rows"] if r["score_minus_exported"]["low"] > 0]
    verdict = (
        f"On test, {', '.join(better)} scored significantly better than the exported choice."
        if better
        else "On test, no row scored significantly better on average than the exported choice."
    )
    operators = ([f"subtract {len(patch.about['concepts'])} concepts"] if patch.subtract else []) + [m.name for m in patch.maps]
    texts = [item.text for item in data.splits["test"].items if item.kind == "text"]
    card = model_card(
        name=out.name,
        base_model=config.model,
        version=patch_retriever.__version__,
        example=texts[0],
        readout=Readout.from_json(readouts["chosen"]).name,
        n_readouts=len(readouts["scores"]) or "one: the preset",
        exported=patch.about["method"],
        setting=", ".join(f"{k} {v}" for k, v in patch.about["setting"].items()) or "no settings",
        needs=patch.about["needs"],
        operators=", ".join(operators),
        golden=f"{json.loads((exported / 'golden' / 'result.json').read_text())['max_abs_diff']:.1g}",
        data=data.about,
        warning=data.warning,
        explanation=EXPLANATION,
        table=(evaluated / "table.md").read_text().strip(),
        verdict=verdict,
    )
    write_text(out / "README.md", card)
    write(out / "modules.json", lambda p: shutil.copyfile(exported / "modules.json", p) and None)
