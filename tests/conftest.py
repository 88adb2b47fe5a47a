"""Fixtures: small models that are made here, small collections, one small finished build."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import pytest
import torch

from families.vision_operators import use_torchvision

use_torchvision()

pytest_plugins = ["real_models"]

if TYPE_CHECKING:
    from fresh import Fresh

SMALL_SCENES = {"calibration": 24, "validation": 20, "test": 24}
SMALL_SAE = {"expansion": 4, "k": 8, "steps": 120, "batch_size": 256}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of families that need torchvision, whatever they call the family."""
    from families import NEEDS

    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in NEEDS for value in params):
            item.add_marker("torchvision")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are slower on many threads, and results do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def golden_check_here() -> Iterator[Callable[[Path], tuple[str, str]]]:
    """Builds check their export in this process: a fresh one takes longer to start than most tests
    run. Tests with `golden_process`, and builds in processes of their own, have the real thing,
    which is what this gives."""
    import contextlib
    import io
    import runpy

    from patch_retriever import golden

    in_a_process = golden.run_check

    def run(script: Path) -> tuple[str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit:
                pass
            except Exception as error:
                return said.getvalue(), f"{type(error).__name__}: {error}"
        return said.getvalue(), ""

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(golden, "run_check", run)
        yield in_a_process


@pytest.fixture
def golden_process(
    golden_check_here: Callable[[Path], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden check runs in a fresh process, as it does for users."""
    monkeypatch.setattr("patch_retriever.golden.run_check", golden_check_here)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA of random weights: width 32, two decoder layers."""
    import random

    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from patch_retriever.scenes.world import sample_scene
    from tiny_mllm.architecture import make_processor

    torch.manual_seed(0)
    rng = random.Random(0)
    processor = make_processor([sample_scene(rng, "train") for _ in range(300)], seed=0)
    ids = processor.tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=72,
            patch_size=12,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        ),
        image_token_index=ids("<image>"),
        image_seq_length=36,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    folder = tmp_path_factory.mktemp("random-llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`stand_in("qwen2-vl")` is the folder of that family's small random model."""
    from functools import cache

    from families import FAMILIES

    @cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp("families") / name
        FAMILIES[name](made)
        return made

    return folder


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that knows sentence-transformers and not this package."""
    from fresh import make_python

    return make_python(tmp_path_factory.mktemp("python") / "venv")


@pytest.fixture(scope="session")
def fresh(
    fresh_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Fresh]]:
    """`fresh()` is a process of that interpreter, `fresh(torchvision=False)` one that has no
    torchvision even where TORCHVISION_FOR_TESTS names one."""
    from functools import cache

    from fresh import Fresh

    started = []

    @cache
    def start(torchvision: bool = True) -> Fresh:
        started.append(Fresh(fresh_python, tmp_path_factory.mktemp("fresh"), torchvision))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture(scope="session")
def finished_build(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small build of the random model on the built-in world."""
    from patch_retriever import build_retriever

    out = tmp_path_factory.mktemp("build") / "out"
    build_retriever(out, model=str(random_model), scenes=SMALL_SCENES, sae=SMALL_SAE, folds=1)
    return out


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Sixty small pictures with texts in `pairs.jsonl`, as a user would have them."""
    import json

    from PIL import Image

    rows = []
    for i in range(60):
        picture = Image.new("RGB", (40 + i % 7, 30 + i % 5), (4 * i, 255 - 4 * i, 90))
        picture.putpixel((i % 30, 3), (255, 255, 255))
        picture.save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"a field of colour number {i}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


@pytest.fixture
def copied(tmp_path):
    """A copy of an SAE that another package saved, which loads as it is."""
    import shutil

    from saved import FIXTURES, Saved

    def copy(case: str) -> Saved:
        saved = Saved(Path(shutil.copytree(FIXTURES / case, tmp_path / case)))
        saved.load()
        return saved

    return copy


@pytest.fixture(scope="module")
def browser():
    """A headless browser; tests of pages are skipped where there is none."""
    from browsing import headless

    yield from headless()
