"""Figures 4 and 5 and Table 5: token roles, layers, poolings and prompts, without any patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patch_retriever.analysis.exhibit import Exhibit, Row, Yardstick, line
from patch_retriever.analysis.finished import Finished
from patch_retriever.analysis.views import AFTER, MASKED, POOLINGS, Outcomes, View
from patch_retriever.backbones.readout import LAST, PAPER, PROMPTS, Prompt
from patch_retriever.report import plots

_POOLING_NAMES = {"mean": "mean", "lasttoken": "last token", "max": "maximum", "min": "minimum"}
_ROLE_NAMES = {"": "all tokens", "special": "without template"} | {
    role: f"without {role}" for role in MASKED[:2]
}


def all_prompts(build: Finished) -> dict[str, Prompt]:
    """The prompts of Table 5 by name, with the build's own."""
    return {p.name: p for p in (*PROMPTS.values(), build.readout.prompt)}


def swept_prompts(build: Finished) -> dict[str, Prompt]:
    """The prompts of Figures 4 and 5: the paper's, and the build's where it is another."""
    return {p.name: p for p in (PAPER, build.readout.prompt)}


def role_figure(build: Finished, outcomes: Mapping[str, Outcomes]) -> Exhibit:
    """Fig. 4: token roles left out of the mean."""
    rows: list[Row] = []
    summary: list[Row] = []
    figures = {}
    for prompt in swept_prompts(build):
        found = outcomes[prompt]
        name = f"{prompt} prompt, mean over all tokens"
        yard = _yardstick(build, found, View(), name)
        groups: dict[str, Sequence[float]] = {}
        for role, said in _ROLE_NAMES.items():
            outcome = found[View(LAST, "mean", role), "nothing"]
            labels = {"prompt": prompt, "mean_over": said}
            rows += yard.rows(labels, outcome)
            summary.append(yard.summary({"prompt": prompt, "mean over": said}, outcome))
            groups[said] = [100 * outcome.recalls(t.name)[1] for t in yard.collection.tasks]
        tasks = [task.name for task in yard.collection.tasks]
        end = "" if prompt == PAPER.name else f"-{prompt}"
        figures[end] = plots.bars(tasks, groups, "R@5 on test, %", f"{prompt} prompt")
    return Exhibit(rows, summary, figures)


def layer_figure(build: Finished, outcomes: Mapping[str, Outcomes]) -> Exhibit:
    """Fig. 5: layer by layer."""
    rows: list[Row] = []
    summary: list[Row] = []
    figures = {}
    for prompt in swept_prompts(build):
        found = outcomes[prompt]
        layers = len({view.site for view, _ in found if view.site.count(".") == 1})
        sites = [*(f"layers.{i}" for i in range(layers)), LAST]
        series = []
        for pooling in POOLINGS[:2]:
            name = f"last hidden state ({prompt} prompt, {_POOLING_NAMES[pooling]})"
            yard = _yardstick(build, found, View(LAST, pooling), name)
            for after in AFTER:
                judged = [found[View(site, pooling), after] for site in sites]
                labels = {"prompt": prompt, "pooling": _POOLING_NAMES[pooling], "then": after}
                for site, outcome in zip(sites, judged, strict=True):
                    rows += yard.rows(labels | {"site": site}, outcome)
                best = max(range(len(sites)), key=lambda i: judged[i].score)
                said = labels | {"best layer": sites[best]}
                summary.append(yard.summary(said, judged[best]))
                centred = "" if after == "nothing" else ", centred"
                like = "" if after == "nothing" else _POOLING_NAMES[pooling]
                bands = [yard.band(outcome) for outcome in judged]
                label = f"{_POOLING_NAMES[pooling]}{centred}"
                series.append(line(label, range(len(sites)), bands, like=like))
        end = "" if prompt == PAPER.name else f"-{prompt}"
        axis = f"after layer ({layers}: last hidden state, normed)"
        title = f"{prompt} prompt; dashed: centred per modality"
        figures[end] = plots.lines(series, axis, "score on test, %", title)
    note = "The best layer is the best on test: it shows where the peak is, it is no choice."
    return Exhibit(rows, summary, figures, note)


def pooling_table(build: Finished, outcomes: Mapping[str, Outcomes]) -> Exhibit:
    """Table 5: poolings under every prompt, raw and centred."""
    yard = _yardstick(
        build, outcomes[PAPER.name], View(), "the paper's readout (its prompt, mean, last layer)"
    )
    rows: list[Row] = []
    summary: list[Row] = []
    skipped = False
    for prompt, found in outcomes.items():
        views = [v for v, after in found if after == AFTER[0] and _in_table(v)]
        skipped = skipped or any(view.site != LAST for view in views)
        for view in sorted(views, key=_order):
            for after in AFTER:
                labels = {"prompt": prompt, "pooling": _pooling_name(view), "then": after}
                rows += yard.rows(labels, found[view, after])
                summary.append(yard.summary(labels, found[view, after]))
    note = (
        ""
        if skipped
        else (
            "FreeRet's readout is left out: in this family no layer norm reads the residual stream "
            "between attention and MLP."
        )
    )
    return Exhibit(rows, summary, note=note)


def _in_table(view: View) -> bool:
    return not view.without and (view.site == LAST or view.site.endswith(".attention"))


def _order(view: View) -> tuple[bool, int]:
    return view.site != LAST, POOLINGS.index(view.pooling)


def _pooling_name(view: View) -> str:
    name = _POOLING_NAMES[view.pooling]
    return name if view.site == LAST else f"{name}, before the last MLP"


def _yardstick(build: Finished, found: Outcomes, view: View, name: str) -> Yardstick:
    return Yardstick(found[view, "nothing"], name, build.data.splits["test"], build.config.seed)
