"""Does it hold? The whole build over several seeds, on the paper's readout and on the chosen one.

A seed draws other calibration, validation and test scenes and trains another SAE; the model is the
same. For every method: the mean over seeds of its test score and of R@1 for full captions, in
percent with the smallest and largest value; on how many seeds its score was significantly above or
below the base in that readout; on how many seeds validation chose it for export.

    python recipes/three_seeds.py --work /tmp/seeds --out docs/three-seeds.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from patch_retriever import build_retriever

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


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where builds go.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Markdown to write.")
@click.option("--model", default="tiny-mllm", show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(work: Path, out: Path, model: str, seeds: int) -> None:
    lines = [f"# {model}, {seeds} seeds", "", (__doc__ or "").split("\n\n")[1].replace("\n", " ")]
    for preset, name in PRESETS.items():
        reports, readouts = [], set()
        for seed in range(seeds):
            folder = work / f"{preset}-{seed}"
            result = build_retriever(folder, model=model, preset=preset, seed=seed, say=print)
            reports.append(result.report)
            patch = json.loads((folder / "patch" / "patch.json").read_text())
            readout = patch["about"]["readout"]
            readouts.add(
                f"{readout['prompt']['name']} prompt, {readout['pooling']} of {readout['site']}"
            )
        lines += ["", f"## On {name} ({'; '.join(sorted(readouts))})", "", *summary(reports)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
