"""What long commands show while they run, all of it on stderr."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patch_retriever.errors import UserError

if TYPE_CHECKING:
    from patch_retriever.sae.train import Now, Watch


def quiet_libraries() -> None:
    """No progress bars and load reports of the libraries' own, and warnings in one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


class Narrator:
    """Lines with the seconds since the start, and bars where someone watches."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self._started = time.monotonic()
        self._bar: Any = None

    def say(self, line: str) -> None:
        """One line."""
        if not self.silent:
            click.echo(f"[{time.monotonic() - self._started:6.1f} s] {line}", err=True)

    def progress(self, steps: Iterable[Any], total: int) -> Iterable[Any]:
        """`steps` with a bar, unless silent or not on a terminal."""
        from tqdm import tqdm

        hidden = self.silent or not sys.stderr.isatty()
        self._bar = tqdm(steps, total=total, leave=False, disable=hidden, file=sys.stderr)
        return self._bar

    def watch(self, now: Now) -> None:
        """Figures of a training beside its bar: of the first SAE, if there are several."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{now.tokens_per_second:,.0f} tokens/s, FVU {now.fvu[0]:.4f}, "
                f"L0 {now.l0[0]:.1f}, dead {now.dead[0]:.1%}"
            )


def board(folder: Path) -> Watch:
    """Writes a training's figures for TensorBoard.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "TensorBoard is not installed; pip install tensorboard, or leave --tensorboard out"
        ) from None
    writer = SummaryWriter(folder)

    def watch(now: Now) -> None:
        writer.add_scalar("tokens/s", now.tokens_per_second, now.step)
        for name in ("fvu", "l0", "dead"):
            for i, value in enumerate(getattr(now, name)):
                writer.add_scalar(f"{name}/{i}", value, now.step)
        writer.flush()

    return watch
