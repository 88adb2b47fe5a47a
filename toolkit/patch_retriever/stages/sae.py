"""The stage that trains the SAE, or takes a given one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patch_retriever.activations.store import Store, StoreSource
from patch_retriever.backbones.readout import Readout
from patch_retriever.backbones.roles import ROLES
from patch_retriever.config import BuildConfig
from patch_retriever.errors import UserError
from patch_retriever.progress import Progress
from patch_retriever.sae.convert import with_thresholds, with_unit_rows
from patch_retriever.sae.formats import load_sae, save_sae
from patch_retriever.sae.metrics import measure
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.processes import Processes
from patch_retriever.sae.settings import POOLED_SHARE
from patch_retriever.sae.train import HELD_OUT_TOKENS, train_saes


def learn_concepts(
    folder_of_store: Path,
    readout: Readout,
    config: BuildConfig,
    folder: Path,
    progress: Progress,
    device: str = "cpu",
) -> None:
    """Train the SAE on a store, on `device`: as `train_sae` would, with the build's seed."""
    store = Store(folder_of_store)
    if config.sae_from is not None:
        sae, about = adopt_sae(config.sae_from, store)
        return save_sae(sae, folder, about)
    settings = config.sae if config.sae.seed is not None else replace(config.sae, seed=config.seed)
    pairs_p2d = None
    if settings.shared != "none":
        pairs_p2d = store.training_pairs()
    (trained,) = train_saes(
        StoreSource(store),
        [settings],
        site=readout.site,
        pooled_share=POOLED_SHARE,
        pairs_p2d=pairs_p2d,
        role_names=ROLES,
        progress=progress,
        processes=Processes(device=device),
    )
    return save_sae(trained.sae, folder, trained.about())


def check_width(sae: SparseAutoencoder, width: int, source: str) -> None:
    """Refuse an SAE of activations of another width.

    Raises:
        UserError: it is one.
    """
    if sae.d_in != width:
        raise UserError(
            f"{source}: an SAE for activations of {sae.d_in} dimensions; the backbone's have "
            f"{width}, so it was trained on another model"
        )


def adopt_sae(
    source: str, store: Store, k: int | None = None
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Somebody's SAE with a threshold per concept and unit rows, and figures of it on a store.

    Raises:
        UserError: it can't be read, or is for activations of another width.
    """
    sae = load_sae(source, k)
    about: dict[str, Any] = {"from": source}
    check_width(sae, store.d, source)
    x_nd, roles_n = store.held_out(HELD_OUT_TOKENS)
    if sae.k is not None:
        sae, conversion = with_thresholds(sae, x_nd[::2])
        about["conversion"] = asdict(conversion)
    sae = with_unit_rows(sae)
    about["metrics"] = measure(sae, x_nd[1::2], roles_n[1::2], ROLES).to_json()
    return sae, about
