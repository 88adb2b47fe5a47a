"""Training SAEs by themselves: from an activation store, or straight from a backbone, to folders
that SAELens loads too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from patch_retriever.errors import UserError
from patch_retriever.progress import Progress, no_progress
from patch_retriever.sae.settings import POOLED_SHARE, SAESettings

if TYPE_CHECKING:
    from torch import Tensor

    from patch_retriever.activations.stream import Source
    from patch_retriever.sae.processes import Processes
    from patch_retriever.sae.train import TrainedSAE, Watch

CHECKPOINTS = "checkpoint"


def train_sae(
    out: Path | str,
    store: Path | str | None = None,
    settings: Sequence[SAESettings] = (SAESettings(),),
    *,
    model: str = "tiny-mllm",
    revision: str | None = None,
    pairs: str = "scenes",
    prompt: str = "paper",
    pooled_share: float = POOLED_SHARE,
    device: str = "cpu",
    checkpoint_every: int = 1000,
    progress: Progress = no_progress,
    watch: Watch | None = None,
) -> list[TrainedSAE]:
    """Train one SAE into `out`, or several in one pass, each into a folder of its name there.

    A stopped training goes on when the same call is made again. Under `accelerate launch` or
    `torchrun` all processes train together and the first one writes.

    Args:
        out: folder to write, in SAELens' layout.
        store: an activation store (a build's `run/collect`). None: activations come straight from
            the backbone `model`, which reads `pairs` with `prompt`; nothing is stored.
        revision: of a `model` on the hub: a branch, a tag or a commit.
        settings: one for each SAE; steps, batch size and the order of tokens are of the first.
            What is not given is what `build` trains with.
        pooled_share: tokens that the readout's pooling reads are repeated up to this share.
        progress: wraps the steps. `watch`: gets figures every ten steps.

    Raises:
        UserError: a wrong setting, no store, or `out` holds something already.
    """
    from patch_retriever.backbones.load import check_device
    from patch_retriever.backbones.roles import ROLES
    from patch_retriever.sae.formats import save_sae
    from patch_retriever.sae.processes import Processes
    from patch_retriever.sae.train import train_saes

    out = Path(out)
    if out.is_file():
        raise UserError(f"{out}: a file; name a folder to write to")
    folders = dict(zip(folder_names(settings), settings, strict=True))
    targets = [out / name for name in folders]
    for target in targets:
        if (target / "cfg.json").exists():
            raise UserError(f"{target}: holds a trained SAE already; name another folder")
    check_device(device)
    processes = Processes.launched(device)
    if store is not None:
        source, site, pairs_p2d = _stored(Path(store), settings, processes)
    else:
        source, site, pairs_p2d = _live(model, revision, pairs, prompt, settings, processes)
    trained = train_saes(
        source,
        settings,
        site=site,
        pooled_share=pooled_share,
        pairs_p2d=pairs_p2d,
        role_names=ROLES,
        folder=out / CHECKPOINTS,
        checkpoint_every=checkpoint_every,
        processes=processes,
        progress=progress,
        watch=watch,
    )
    if processes.rank == 0:
        for target, one in zip(targets, trained, strict=True):
            save_sae(one.sae, target, one.about())
        _remove_checkpoint(out / CHECKPOINTS)
    return trained


def folder_names(settings: Sequence[SAESettings]) -> list[str]:
    """A folder for each SAE, named after what tells it apart; "." for a single one.

    Raises:
        UserError: two would get the same name.
    """
    if len(settings) == 1:
        return ["."]
    names = [f"{s.architecture}-k{s.k}-x{s.expansion}-seed{s.seed}" for s in settings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} twice: SAEs of one pass differ in one of these at least")
    return names


def stabilities(trained: Sequence[TrainedSAE]) -> dict[str, float]:
    """Stability of every two SAEs that differ in nothing but the seed."""
    from patch_retriever.sae.metrics import stability

    found = {}
    named = zip(folder_names([one.settings for one in trained]), trained, strict=True)
    for (name_a, a), (name_b, b) in combinations(named, 2):
        if replace(a.settings, seed=0) == replace(b.settings, seed=0):
            found[f"{name_a} and {name_b}"] = stability(a.sae.W_dec_cd, b.sae.W_dec_cd)
    return found


def _stored(
    folder: Path, settings: Sequence[SAESettings], processes: Processes
) -> tuple[Source, str | None, Tensor | None]:
    """A store as the source, its site, and its pairs if concepts are to be shared."""
    from patch_retriever.activations.store import Store, StoreSource

    store = Store(folder)
    pairs_p2d = None
    if any(s.shared != "none" for s in settings):
        pairs_p2d = store.training_pairs()
    source = StoreSource(store, processes.rank, processes.count)
    return source, getattr(store, "site", None), pairs_p2d


def _live(
    model: str,
    revision: str | None,
    pairs: str,
    prompt: str,
    settings: Sequence[SAESettings],
    processes: Processes,
) -> tuple[Source, str, None]:
    """A backbone as the source, and the site that is read."""
    from patch_retriever.activations.live import LiveSource
    from patch_retriever.backbones.load import load_backbone
    from patch_retriever.backbones.readout import PROMPTS, Readout
    from patch_retriever.data import all_items

    if any(s.shared != "none" for s in settings):
        raise UserError("shared concepts need a store's pairs; collect one with `build`")
    transformer = load_backbone(model, device=processes.device, revision=revision)
    items = all_items(pairs)
    readout = Readout(PROMPTS[prompt])
    source = LiveSource(
        transformer,
        items,
        readout,
        rank=processes.rank,
        processes=processes.count,
    )
    return source, readout.site, None


def _remove_checkpoint(folder: Path) -> None:
    """What only a stopped training needs, and nothing else that lies there."""
    from patch_retriever.sae.checkpoint import FILE

    (folder / FILE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
