"""What a choice costs with few pairs: 100 of the built-in world, split anew for every seed.

A large pool of pairs (a scene and a caption in the style of the web, other scenes than the build's
calibration) goes through the model once. For every seed 100 of them are split as `build` splits
pairs; the methods are fitted and one is chosen as before (best score on validation, fitted on
calibration) and as now (`stages/trials.py`, `stages/choice.py`). Both are judged on the test pairs
and on all pairs of the pool that neither fit nor choice saw: regret is the best row's score there
less the chosen one's, in points, each way among the rows fitted its own way. The readout and the
SAE are the build's.

    patch-retriever build -o demo
    python recipes/small_data.py --build demo --work /tmp/small --out docs/small-data.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from patch_retriever.activations.collect import collect_features
from patch_retriever.backbones.load import load_backbone
from patch_retriever.concepts.query import TABLE
from patch_retriever.config import BuildConfig
from patch_retriever.data import SPLITS, Data
from patch_retriever.features import Features
from patch_retriever.items import Item
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods import Method, methods
from patch_retriever.progress import no_progress
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import Outcome, PairedBootstrap, evaluate
from patch_retriever.retrieval.pairs import Pair, pairs_collection, split_pairs
from patch_retriever.runs import MARKER
from patch_retriever.sae.formats import load_sae
from patch_retriever.scenes.tasks import scenes_collection
from patch_retriever.stages.features import SavedFeatures
from patch_retriever.stages.readout import load_readout
from patch_retriever.stages.scoring import scored
from patch_retriever.stages.selection import load_calibration, select
from patch_retriever.stages.trials import fitted_splits, trials

Key = tuple[str | None, str]


class Pool:
    """Pairs of the built-in world and the features of their items, collected once."""

    def __init__(self, build: Path, work: Path, n: int) -> None:
        self.run, self.work = build / "run", work
        config = BuildConfig.read(build / MARKER)
        self.readout, self.sae = load_readout(self.run / "readout"), load_sae(self.run / "sae")
        world = scenes_collection("test", n, 0)
        (task,) = (task for task in world.tasks if task.name == "t->i web")
        self.pairs = []
        for query, document in zip(task.queries, task.documents, strict=False):
            text, shown = world.items[query].text, world.items[document].picture
            assert text is not None and shown is not None
            self.pairs.append(Pair(shown, text, shown.content_hash()))
        everything = pairs_collection("pool", self.pairs)
        path = work / "pool.safetensors"
        if not path.is_file():
            kinds_n = torch.from_numpy(everything.kinds())
            collect_features(
                load_backbone(config.model), everything.items, self.readout, self.sae, kinds_n,
                config.batch_size, no_progress, True,
            ).save(path)  # fmt: skip
        self._features = Features.load(path)
        self._row = {_key(item): i for i, item in enumerate(everything.items)}

    def features(self, collection: Collection) -> Features:
        """Those of a collection's items."""
        return self._features.rows(torch.tensor([self._row[_key(i)] for i in collection.items]))

    def split(self, n: int, seed: int) -> tuple[Data, Collection]:
        """`n` pairs as a build would split them, and a collection of its test pairs and all others
        of the pool."""
        order = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(seed))
        few = [self.pairs[i] for i in order[:n].tolist()]
        rest = [self.pairs[i] for i in order[n:].tolist()]
        splits = split_pairs(few, seed)
        collections = {name: pairs_collection(name, pairs) for name, pairs in splits.items()}
        return Data(collections, f"{n} pairs."), pairs_collection("rest", splits["test"] + rest)


def _key(item: Item) -> Key:
    return item.text, item.picture.content_hash() if item.picture else ""


@dataclass(frozen=True)
class Way:
    """A way to choose: rows fitted and judged, and which of them is taken."""

    outcomes: dict[str, Outcome]
    chosen: str

    def regret(self) -> float:
        """The best row's score less the chosen one's, in points."""
        best = max(one.score for one in self.outcomes.values())
        return 100 * (best - self.outcomes[self.chosen].score)

    def best(self) -> str:
        """The best row's id."""
        return max(self.outcomes, key=lambda one: self.outcomes[one].score)

    def below_base(self) -> bool:
        """Whether the chosen row is significantly worse than the base."""
        base, chosen = self.outcomes["base"], self.outcomes[self.chosen]
        sizes = {task: len(hits) for task, hits in base.hits_by_task.items()}
        return PairedBootstrap(sizes, 0).average(chosen, base).high < 0


def choosable(c: Calibration) -> Iterator[Method]:
    """All methods but controls, which are never chosen."""
    return (method for method in methods(c) if method.control_of is None)


def measured(pool: Pool, n: int, seed: int, folds: int) -> dict[str, dict[str, Way]]:
    """Both ways to choose for one seed, on the test pairs and on the rest of the pool."""
    data, rest = pool.split(n, seed)
    folder = pool.work / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    features = {split: pool.features(data.splits[split]) for split in SPLITS}
    for split in SPLITS:
        features[split].save(folder / f"{split}.safetensors")
    table, _ = scored(
        features["calibration"], data.splits["calibration"], pool.sae, "tokens", data.about
    )
    table.save(folder / TABLE)
    found: dict[str, dict[str, Way]] = {"test pairs": {}, "all other pairs": {}}
    for way, k in (("before", 1), ("now", folds)):
        saved = SavedFeatures(folder)
        c = load_calibration(
            pool.readout, data, saved, pool.run / "sae", folder, seed, None, fitted_splits(data, k)
        )
        made = tuple(choosable(c))
        held_out = trials(c, made, data, saved.of_all, choosable, k)
        select(c, held_out, pool.readout, folder / way, no_progress, made)
        selection = json.loads((folder / way / "selection.json").read_text())
        choices: dict[str, dict[str, Any]] = {one["id"]: one for one in selection["methods"]}
        chosen = selection["exported_id"] if way == "now" else selection["choice"]["best"]
        by_id = {method.id: method for method in made}
        for name, collection in (("test pairs", data.splits["test"]), ("all other pairs", rest)):
            judged = pool.features(collection)
            outcomes = {
                i: evaluate(by_id[i].make(**one["setting"]), judged, collection)
                for i, one in choices.items()
            }
            found[name][way] = Way(outcomes, chosen)
    return found


def lines_of(seed: int, found: dict[str, dict[str, Way]]) -> str:
    """A row of the table."""
    rest, test = found["all other pairs"], found["test pairs"]
    cells = [str(seed), f"{100 * rest['before'].outcomes['base'].score:.1f}"]
    for way in ("before", "now"):
        one = rest[way]
        below = " (below base)" if one.below_base() else ""
        cells += [
            one.chosen,
            f"{100 * one.outcomes[one.chosen].score:.1f}{below}",
            f"{one.regret():.1f}",
            f"{test[way].regret():.1f}",
        ]
    return f"| {' | '.join(cells)} |"


def mean(values: Sequence[float]) -> str:
    """The mean with the largest value."""
    return f"{sum(values) / len(values):.2f} (at most {max(values):.1f})"


@click.command(help=__doc__)
@click.option("--build", type=click.Path(path_type=Path), required=True, help="A finished build.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where features go.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Markdown to write.")
@click.option("--pool", default=500, show_default=True, help="Pairs that are encoded.")
@click.option("--pairs", default=100, show_default=True, help="Pairs of a build.")
@click.option("--seeds", default=10, show_default=True)
@click.option("--folds", default=5, show_default=True)
def main(build: Path, work: Path, out: Path, pool: int, pairs: int, seeds: int, folds: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    made = Pool(build, work, pool)
    lines = [
        f"# Choosing with {pairs} pairs",
        "",
        (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "",
        "| seed | base | before: chosen | score | regret | on test pairs | now: chosen | score "
        "| regret | on test pairs |",
        "|" + "---|" * 10,
    ]
    every = []
    for seed in range(seeds):
        every.append(measured(made, pairs, seed, folds))
        lines.append(lines_of(seed, every[-1]))
        print(lines[-1], flush=True)
    lines.append("")
    for way in ("before", "now"):
        for name in ("all other pairs", "test pairs"):
            regrets = [one[name][way].regret() for one in every]
            below = sum(one[name][way].below_base() for one in every)
            lines.append(
                f"- {way}, {name}: mean regret {mean(regrets)}; significantly below the base on "
                f"{below} of {seeds} seeds"
            )
        known = [
            replace(one["test pairs"][way], chosen=one["all other pairs"][way].best())
            for one in every
        ]
        lines.append(
            f"- {way}, test pairs, had the row been chosen that is best on all other pairs: mean "
            f"regret {mean([one.regret() for one in known])}"
        )
        scores = [w.outcomes[w.chosen].score for w in (o["all other pairs"][way] for o in every)]
        lines.append(f"- {way}: mean score on all other pairs {100 * sum(scores) / seeds:.2f}")
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-8:]))


if __name__ == "__main__":
    main()
