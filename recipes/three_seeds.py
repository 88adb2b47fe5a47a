"""Does it hold? The whole build over several seeds, on the paper's readout and on the chosen one.

A seed draws other calibration, validation and test scenes and trains another SAE; the model is the
same. For every method: the mean over seeds of its test score and of R@1 for full captions, in
percent with the smallest and largest value; on how many seeds its score was significantly above or
below the base in that readout; on how many seeds validation chose it for export. Below that, what
every seed exported, and every method less its controls in score, with 95% intervals.

    python recipes/three_seeds.py --work /tmp/seeds --out docs/three-seeds.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from patch_retriever import build_retriever
from patch_retriever.backbones.readout import Readout

PRESETS = {"paper": "the paper's readout", "auto": "the readout chosen on validation"}


def summary(reports: list[dict[str, Any]]) -> list[str]:
    """Table rows, method by method, over the seeds' reports."""
    lines = [
        "| method | needs | score | R@1 t->i full | above / below base | exported |",
        "|---|---|---|---|---|---|",
    ]
    for first in reports[0]["rows"]:
        rows = [row for report in reports for row in report["rows"] if row["id"] == first["id"]]
        above = sum(row["score_minus_base"]["low"] > 0 for row in rows)
        below = sum(row["score_minus_base"]["high"] < 0 for row in rows)
        exported = sum(report["exported_id"] == first["id"] for report in reports)
        cells = [
            first["method"],
            first["needs"],
            spread([row["test_score"] for row in rows]),
            spread([row["tasks"]["t->i full"]["R@1"] for row in rows]),
            f"{above} / {below} of {len(rows)}",
            str(exported or ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Mean [smallest, largest], in percent."""
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


def by_seed(reports: list[dict[str, Any]]) -> list[str]:
    """What every seed's build exported, and its figures on test."""
    lines = ["| seed | exported | score | against base | R@1 t->i full | R@10 t->i short |"]
    lines.append("|---|---|---|---|---|---|")
    for seed, report in enumerate(reports):
        row = next(row for row in report["rows"] if row["id"] == report["exported_id"])
        recalls = [row["tasks"]["t->i full"]["R@1"], row["tasks"]["t->i short"]["R@10"]]
        figures = [f"{100 * value:.1f}" for value in (row["test_score"], *recalls)]
        figures.insert(1, interval(row["score_minus_base"]))
        lines.append(f"| {seed} | {row['method']} | {' | '.join(figures)} |")
    return lines


def against_controls(reports: list[dict[str, Any]]) -> list[str]:
    """Every method less its controls, and less the same without concepts, seed by seed."""
    lines = [f"| method | less | {' | '.join(f'seed {n}' for n in range(len(reports)))} |"]
    lines.append("|---|---|" + "---|" * len(reports))
    titles = {row["id"]: row["method"] for report in reports for row in report["rows"]}
    found: dict[tuple[str, str], dict[int, str]] = {}
    for seed, report in enumerate(reports):
        for row in report["rows"]:
            for other, difference in row["score_minus_others"].items():
                found.setdefault((row["id"], other), {})[seed] = interval(difference)
    for (method, other), cells in found.items():
        columns = " | ".join(cells.get(seed, "") for seed in range(len(reports)))
        lines.append(f"| {titles[method]} | {titles[other]} | {columns} |")
    return lines


def interval(difference: dict[str, float]) -> str:
    """Mean [low, high], in points."""
    mean, low, high = (f"{100 * difference[name]:+.2f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where builds go.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Markdown to write.")
@click.option("--model", default="tiny-mllm", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)))
@click.option("--scenes", nargs=3, type=int, help="Of calibration, validation, test.")
@click.option("--batch-size", default=64, show_default=True)
def main(
    work: Path,
    out: Path,
    model: str,
    seeds: int,
    presets: tuple[str, ...],
    scenes: tuple[int, int, int] | None,
    batch_size: int,
) -> None:
    about = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    lines = [f"# {Path(model).name}, {seeds} seeds", "", about]
    settings: dict[str, Any] = {"model": model, "batch_size": batch_size}
    if scenes is not None:
        sizes = dict(zip(("calibration", "validation", "test"), scenes, strict=True))
        settings["scenes"] = sizes
        lines += ["", f"Scenes: {', '.join(f'{n} for {split}' for split, n in sizes.items())}."]
    for preset in presets or PRESETS:
        reports, readouts = [], set()
        for seed in range(seeds):
            folder = work / f"{preset}-{seed}"
            result = build_retriever(folder, preset=preset, seed=seed, say=print, **settings)
            reports.append(result.report)
            patch = json.loads((folder / "patch" / "patch.json").read_text())
            readouts.add(Readout.from_json(patch["about"]["readout"]).name)
        lines += ["", f"## On {PRESETS[preset]} ({'; '.join(sorted(readouts))})"]
        for part in (summary, by_seed, against_controls):
            lines += ["", *part(reports)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
