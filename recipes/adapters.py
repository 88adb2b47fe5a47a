"""Do adapters add to a patch, and does rebalancing add to a contrastive loss? Six controls.

Every training of a seed takes the same steps over the same pairs, and its last weights count:
nothing is picked. `fit anew` tries every method that is no control on validation, as a build does.
A seed draws other calibration, validation and test scenes, another SAE and another adapter; the
model is the built-in one. Results are kept under --work, and a second run goes on from there.

    python recipes/adapters.py --work /tmp/adapters --out docs/adapter-controls.md

Seeds can be measured side by side, each by a process of its own with the same --work (--seed 0);
the tables are of all that is there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from patch_retriever import build_retriever
from patch_retriever.adapters.batches import captions_of, some_of
from patch_retriever.adapters.forward import PatchedForward
from patch_retriever.adapters.looks import Training
from patch_retriever.adapters.losses import ConceptGroups
from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.adapters.training import AdapterTrainer
from patch_retriever.backbones.adapter import Merged, save_adapter
from patch_retriever.backbones.load import built_in_model, load_backbone
from patch_retriever.concepts.query import TABLE
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.config import BuildConfig
from patch_retriever.data import SPLITS, scenes_data
from patch_retriever.files import write_json, write_tensors
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.methods import methods
from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap, evaluate
from patch_retriever.retrieval.statistics import Difference
from patch_retriever.runs import MARKER
from patch_retriever.sae.formats import load_sae
from patch_retriever.stages.features import SavedFeatures, collect_splits
from patch_retriever.stages.readout import load_readout
from patch_retriever.stages.scoring import score
from patch_retriever.stages.selection import load_calibration
from tiny_mllm.measure import measure

BASE, PATCH = "base: no patch, no adapter", "patch without adapter"


@dataclass(frozen=True)
class Control:
    """One training: its settings, what its model is called with the patch it was trained with (or
    without any), and with a patch fitted anew, where that is asked for."""

    settings: dict[str, Any]
    called: str
    anew: str = ""


CONTROLS = {
    "contrastive": Control(
        {"rebalancing": 0.0},
        "contrastive without rebalancing, on the patch",
        "the same, then patch fitted anew",
    ),
    "rebalancing": Control({"contrastive": 0.0}, "rebalancing alone, on the patch"),
    "all": Control({}, "patch, then adapter", "patch, then adapter, then patch fitted anew"),
    "without": Control(
        {"with_patch": False}, "adapter without patch", "adapter, then patch fitted anew"
    ),
}
SHARES = (0.25, 0.5, 1.0)


class Seed:
    """One seed's build, and the model that its adapters are trained in."""

    def __init__(self, folder: Path, seed: int) -> None:
        build_retriever(folder, seed=seed, say=print)
        self.run, self.seed = folder / "run", seed
        self.config = BuildConfig.read(folder / MARKER)
        self.data = scenes_data(self.config.scenes.model_dump(), seed)
        self.readout = load_readout(self.run / "readout")
        self.transformer = load_backbone(self.config.model)
        self.patch = Patch.load(self.run / "select" / "patch")
        self.sae = load_sae(self.run / "sae")
        self.groups = ConceptGroups.of(self.sae, ConceptTable.load(self.run / "score" / TABLE))

    def outcome(self, patch: Patch, features: Path) -> Outcome:
        """On test."""
        return evaluate([patch], SavedFeatures(features).of("test"), self.data.splits["test"])

    def train(self, settings: AdapterSettings, share: float, folder: Path) -> Training:
        """An adapter's last weights into `folder`."""
        patch = self.patch if settings.with_patch else Patch(self.patch.site)
        training = some_of(self.data.splits["calibration"], share, self.seed)
        trainer = AdapterTrainer(
            PatchedForward(self.transformer, self.readout, patch, self.groups.energy),
            training,
            self.data.splits["validation"],
            captions_of(training, settings.captions),
            settings,
            self.seed,
        )
        try:
            trained = trainer.train(watch=lambda look: print(" ", look.to_text(), flush=True))
            save_adapter(trainer.peft_model, folder, str(built_in_model()), asdict(settings))
        finally:
            trainer.close()
        return trained

    def measure(self, control: Control, adapter: Path, folder: Path) -> dict[str, Outcome]:
        """The trained model on test, by what it is called."""
        own = self.patch if control.settings.get("with_patch", True) else Patch(self.patch.site)
        splits = SPLITS if control.anew else SPLITS[2:]
        features = folder / "features"
        with Merged(self.transformer, adapter):
            collect_splits(
                self.transformer, self.data, self.readout, self.run / "sae", features, 64,
                lambda steps, _: steps, splits,
            )  # fmt: skip
        found = {control.called: self.outcome(own, features)}
        if control.anew:
            found[control.anew] = self.outcome(self._fitted(features, folder), features)
        return found

    def _fitted(self, features: Path, folder: Path) -> Patch:
        """The best patch of an adapted model, by validation."""
        score(
            self.transformer, self.data, self.readout, features, self.run / "sae", "tokens", folder
        )
        saved = SavedFeatures(features)
        calibration = load_calibration(
            self.readout, self.data, saved, self.run / "sae", folder, self.seed
        )
        tried = [
            (patch, method.id)
            for method in methods(calibration)
            if method.control_of is None and not method.left_out and method.id != "pair"
            for setting in method.grid
            for patch in method.make(**setting)
        ]
        held_out, collection = saved.of("validation"), self.data.splits["validation"]
        best, name = max(tried, key=lambda one: evaluate([one[0]], held_out, collection).score)
        print(f"  fitted anew: {name}", flush=True)
        return best


def save_outcomes(outcomes: dict[str, Outcome], path: Path) -> None:
    """Hits of every query, by name and task."""
    tensors = {
        f"{name}/{task}": torch.from_numpy(np.ascontiguousarray(hits))
        for name, outcome in outcomes.items()
        for task, hits in outcome.hits_by_task.items()
    }
    write_tensors(path, tensors)


def load_outcomes(path: Path) -> dict[str, Outcome]:
    """What `save_outcomes` wrote."""
    from safetensors.numpy import load_file

    found: dict[str, dict[str, Any]] = {}
    for key, hits in load_file(path).items():
        name, _, task = key.partition("/")
        found.setdefault(name, {})[task] = hits
    return {name: Outcome(hits) for name, hits in found.items()}


def together(outcomes: list[Outcome]) -> Outcome:
    """Several seeds' outcomes as one: every query of every seed."""
    tasks = outcomes[0].hits_by_task
    return Outcome({t: np.concatenate([one.hits_by_task[t] for one in outcomes]) for t in tasks})


def compared(a: list[Outcome], b: list[Outcome]) -> Difference:
    """a - b in the score, seed by seed and query by query."""
    one, other = together(a), together(b)
    sizes = {task: len(hits) for task, hits in one.hits_by_task.items()}
    return PairedBootstrap(sizes, 0).average(one, other)


def shown(difference: Difference) -> str:
    """In percent, with the interval."""
    return (
        f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    )


def finished(work: Path, share: float) -> list[Path]:
    """Folders of this share of the pairs in which every training was measured, by seed."""
    cells = sorted(work.glob(f"seed-*/{share:g}"))
    return [c for c in cells if all((c / n / "outcomes.safetensors").is_file() for n in CONTROLS)]


def summary(work: Path, settings: AdapterSettings) -> list[str]:
    """The tables, from what was measured."""
    by_share: dict[float, dict[str, list[Outcome]]] = {}
    for share in SHARES:
        cells = finished(work, share)
        for cell in cells:
            files = [cell.parent / "outcomes.safetensors"]
            files += [cell / name / "outcomes.safetensors" for name in CONTROLS]
            for file in files:
                for name, outcome in load_outcomes(file).items():
                    by_share.setdefault(share, {}).setdefault(name, []).append(outcome)
    full = by_share[1.0]
    names = list(
        dict.fromkeys(
            [BASE, PATCH, *(n for c in CONTROLS.values() for n in (c.called, c.anew) if n)]
        )
    )
    lines = [
        f"{len(full[BASE])} seeds, {settings.steps} steps of {settings.batch_size} pairs with "
        f"{settings.hard_negatives} hard negatives each, {settings.method} of rank "
        f"{settings.rank}, "
        f"learning rate {settings.lr:g}, all 3,500 pairs of calibration. Scores are of test, in "
        "percent (mean of R@1, R@5 and R@10 over ten tasks), brackets 95% intervals of the paired "
        "difference over the queries of all seeds.",
        "",
        "| control | score | of each seed | R@1 t->i full | against the patch alone |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        found = full[name]
        each = ", ".join(f"{100 * one.score:.1f}" for one in found)
        r1 = np.mean([one.recalls("t->i full")[0] for one in found])
        against = "" if name == PATCH else shown(compared(found, full[PATCH]))
        mean = np.mean([one.score for one in found])
        lines.append(f"| {name} | {100 * mean:.1f} | {each} | {100 * r1:.1f} | {against} |")
    a, b = CONTROLS["all"].called, CONTROLS["contrastive"].called
    lines += [
        "",
        f"Rebalancing beside the contrastive loss, at an equal budget ({a} against {b}): "
        f"{shown(compared(full[a], full[b]))}; with the patch fitted anew after both: "
        f"{shown(compared(full[CONTROLS['all'].anew], full[CONTROLS['contrastive'].anew]))}.",
        "",
        "## With fewer pairs",
        "",
        "The same steps over a quarter, half and all of the pairs: test score (of each seed).",
        "",
        "| control | " + " | ".join(f"{s:g} of the pairs" for s in sorted(by_share)) + " |",
        "|---|" + "---|" * len(by_share),
    ]
    for name in names:
        scores = [[one.score for one in by_share[s][name]] for s in sorted(by_share)]
        row = [
            f"{100 * np.mean(some):.1f} ({', '.join(f'{100 * one:.1f}' for one in some)})"
            for some in scores
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return [*lines, "", *_energies(work), "", *_descriptions(work)]


def _energies(work: Path) -> list[str]:
    """Shares of energy and what is said of pictures, before and after."""
    lines = [
        "## Energy",
        "",
        "Share of the training items' energy in concepts to grow (visual, discriminative) and to "
        "shrink (text-dominant, distractors), before and in the last steps; retention: KL to the "
        "base's next tokens, in nats.",
        "",
        "| training | to grow | to shrink | retention |",
        "|---|---|---|---|",
    ]
    for name, control in CONTROLS.items():
        logs = [cell / name / "training.json" for cell in finished(work, 1.0)]
        looks = [json.loads(log.read_text())["looks"] for log in logs]

        def moved(key: str, looks: list[Any] = looks) -> str:
            before, after = (100 * np.mean([one[i][key] for one in looks]) for i in (0, -1))
            return f"{before:.1f} to {after:.1f}%" if after else f"{before:.1f}%, not followed"

        kl = np.mean([one[-1]["retention"] for one in looks])
        lines.append(
            f"| {control.called} | {moved('up_share')} | {moved('down_share')} | {kl:.4f} |"
        )
    return lines


def describe(adapter: Path | None) -> dict[str, float]:
    """What the built-in model, with an adapter merged into it, says about pictures it never saw:
    shares right (`tiny_mllm.measure`)."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = built_in_model()
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if adapter is not None:
        PeftModel.from_pretrained(model.model, str(adapter)).merge_and_unload()
    return measure(model, AutoProcessor.from_pretrained(folder), "test", 100, seed=0)


def _descriptions(work: Path) -> list[str]:
    """What the model says about pictures, before and after."""
    file = work / "captions.json"
    if not file.is_file():
        return []
    found: dict[str, dict[str, float]] = json.loads(file.read_text())
    keys = ("colour", "shape", "count", "whole caption", "questions")
    lines = [
        "## What it says about pictures",
        "",
        "Share right in greedy captions and answers about 100 scenes of test, with the adapter of "
        "seed 0 merged into the whole model; in percent.",
        "",
        f"| training | {' | '.join(keys)} |",
        "|---|" + "---|" * len(keys),
    ]
    for name, figures in found.items():
        cells = " | ".join(f"{100 * figures[key]:.1f}" for key in keys)
        called = CONTROLS[name].called if name in CONTROLS else name
        lines.append(f"| {called} | {cells} |")
    return lines


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where results go.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Markdown to write.")
@click.option("--seed", "seeds", multiple=True, default=(0, 1, 2), show_default=True, type=int)
@click.option("--steps", default=100, show_default=True)
@click.option("--summary-only", is_flag=True, help="Tables of what is there.")
def main(work: Path, out: Path, seeds: tuple[int, ...], steps: int, summary_only: bool) -> None:
    common = AdapterSettings(
        steps=steps, lr=3e-3, warmup=10, batch_size=20, hard_negatives=2, chunk_size=128,
        validate_every=steps,
    )  # fmt: skip
    for number in () if summary_only else seeds:
        folder = work / f"seed-{number}"
        seed = Seed(folder / "build", number)
        base = {BASE: Patch(seed.patch.site), PATCH: seed.patch}
        outcomes = {n: seed.outcome(p, seed.run / "features") for n, p in base.items()}
        save_outcomes(outcomes, folder / "outcomes.safetensors")
        for share in reversed(SHARES):
            for name, control in CONTROLS.items():
                cell = folder / f"{share:g}" / name
                if (cell / "outcomes.safetensors").is_file():
                    continue
                print(f"seed {number}, {share:g} of the pairs: {control.called}", flush=True)
                if not (cell / "training.json").is_file():
                    settings = AdapterSettings(**{**asdict(common), **control.settings})
                    trained = seed.train(settings, share, cell / "adapter")
                    write_json(cell / "training.json", trained.to_json())
                outcomes = seed.measure(control, cell / "adapter", cell)
                for called, outcome in outcomes.items():
                    print(f"  test, {called}: {100 * outcome.score:.1f}", flush=True)
                save_outcomes(outcomes, cell / "outcomes.safetensors")
    if not summary_only and 0 in seeds and not (work / "captions.json").is_file():
        adapters = {name: work / "seed-0" / "1" / name / "adapter" for name in CONTROLS}
        described = {"no adapter": describe(None)} | {n: describe(p) for n, p in adapters.items()}
        write_json(work / "captions.json", described)
    lines = ["# Adapters: six controls", "", *summary(work, common)]
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
