"""What a run is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper.official import PaperModel
from patch_retriever.errors import UserError

SHOWN_TASKS = ("mbeir_mscoco_task3", "mbeir_nights_task4", "mbeir_cirr_task7")
"""The tasks of Tables 5 and 8."""
REMOVAL_TASK = "mbeir_mscoco_task3"
"""The task of Table 2."""


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    model: PaperModel
    weights: str
    out: Path
    mbeir: Path
    coco: Path | None = None
    tasks: tuple[str, ...] = ()
    """Names as on the Hub."""
    limit: int | None = None
    calibration: int = 10_000
    """Captioned pictures that the frozen statistics and the attribution are taken of."""
    sae: str | None = None
    sae_steps: int | None = None
    batch_size: int = 8
    dtype: str = "float16"
    device: str = "cpu"
    revision: str | None = None
    skip_bad: bool = False

    @property
    def folder(self) -> Path:
        """Everything of this model."""
        return self.out / self.model.name

    @property
    def n_calibration(self) -> int:
        """As many as that, and in a trial no more than its queries."""
        return self.calibration if self.limit is None else min(self.calibration, self.limit)

    @property
    def how(self) -> dict[str, Any]:
        """What stands beside every result."""
        return {"weights": self.weights, "dtype": self.dtype, "limit": self.limit}

    def check_results(self) -> None:
        """Refuse to write over the results of another run.

        Raises:
            UserError: what lies there was measured otherwise.
        """
        for path in sorted((self.folder / "results").glob("*.json")):
            found = json.loads(path.read_text())
            for name, value in self.how.items():
                if found[name] != value:
                    raise UserError(
                        f"{path}: measured with {name} {found[name]}, not {value}; name another "
                        "folder with -o"
                    )
