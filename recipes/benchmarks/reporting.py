"""What all benchmarks here say in the same way: the machine, and the line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def machine(threads: int) -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            1,
        ),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in features]
    return f"{names[0] if names else platform.processor()} ({', '.join(units)})"


class Report:
    """Lines for people, then one line of JSON; with `json_only` that line alone."""

    def __init__(self, json_only: bool) -> None:
        self.json_only = json_only

    def say(self, *lines: str) -> None:
        """To standard output, for people."""
        if not self.json_only:
            for line in lines:
                click.echo(line)

    def progress(self, line: str) -> None:
        """To standard error, in both modes."""
        click.echo(line, err=True)

    def finish(self, figures: dict[str, Any]) -> None:
        """The line that programs read."""
        click.echo(json.dumps(figures))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, its columns aligned so that it can be read as it is; numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, head, widths)) + " |"]
    lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


class Peak:
    """The largest memory of its own that this process held, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.mib = 0.0
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            own = next(line for line in lines if line.startswith("RssAnon"))
            self.mib = max(self.mib, int(own.split()[1]) / 2**10)
