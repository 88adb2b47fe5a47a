"""The command line: `patch-retriever COMMAND`, one module for each command."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from patch_retriever import __version__
from patch_retriever.cli.adapt import adapt
from patch_retriever.cli.analyze import analyze
from patch_retriever.cli.build import build
from patch_retriever.cli.concepts import concepts
from patch_retriever.cli.convert_sae import convert_sae
from patch_retriever.cli.doctor import doctor
from patch_retriever.cli.encode import encode
from patch_retriever.cli.evaluate import evaluate
from patch_retriever.cli.explain import explain
from patch_retriever.cli.export import export
from patch_retriever.cli.index import index, index_migrate, index_remove
from patch_retriever.cli.info import info
from patch_retriever.cli.mteb import mteb
from patch_retriever.cli.search import search
from patch_retriever.cli.train_sae import train_sae
from patch_retriever.errors import UserError


class _Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): it ends as if it had been interrupted."""


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM unwinds as an interrupt does, so that locks and temporary files go."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _OneLineErrors(click.Group):
    """What a user can mend is one line on stderr and exit code 2; a stop by a signal is a line and
    exit code 128 plus the signal's number."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with _ending_in_order():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
            click.echo(
                f"Stopped by {number.name}: what is finished stays and nothing is half-written; "
                "give the same command again",
                err=True,
            )
            return ctx.exit(128 + number)
        except UserError as error:
            message = str(error)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "patch-retriever"
            message = f"{error.format_message()} (see `{path} --help`)"
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = error.filename or "the disk"
            message = f"{where}: no space left; free some and run the same again"
        click.echo(f"Error: {message}", err=True)
        return ctx.exit(2)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="patch-retriever")
def main() -> None:
    """Turn a multimodal LLM into a good retriever by patching it.

    \b
    patch-retriever build -o demo                     the built-in model and world
    patch-retriever build Qwen/Qwen2-VL-2B-Instruct --pairs photos.jsonl -o my-retriever
    patch-retriever adapt my-retriever                train an adapter through its patch
    patch-retriever export demo --method cca -o cca   another row of the table
    patch-retriever info my-retriever                 what was done, and the table
    patch-retriever concepts my-retriever             scores of every concept
    patch-retriever train-sae demo/run/collect -o sae  an SAE of your own
    patch-retriever evaluate my-retriever other/model side by side on held-out tasks
    patch-retriever index photos -m demo -o photos-index
    patch-retriever search photos-index "a red bag"
    patch-retriever mteb my-retriever --benchmark "MIEB(lite)" -o results
    patch-retriever explain demo "a red star" a.png   one similarity, part by part
    patch-retriever analyze demo -o analysis          the paper's figures and tables about it
    """


for command in (
    build,
    adapt,
    export,
    concepts,
    explain,
    analyze,
    train_sae,
    convert_sae,
    evaluate,
    mteb,
    encode,
    index,
    index_remove,
    index_migrate,
    search,
    info,
    doctor,
):
    main.add_command(command)
