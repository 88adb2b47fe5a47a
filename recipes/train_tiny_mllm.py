"""Train the built-in MLLM (checkpoints/tiny-mllm) from nothing, the way MLLMs are trained.

1. The vision tower alone, supervised on what stands in each of the nine cells of a picture; the
   classification head is thrown away.
2. Tower, projector and language model together on conversations about pictures and texts
   (captions, short answers, one true word, edits, text-only sentences) with the causal
   language-model loss and nothing else: no contrastive or retrieval loss anywhere.

Only scenes of the `train` split are seen. At the end the model is measured on scenes of the
`test` split and written, in bf16, with a card that says what was done and found.

    python recipes/train_tiny_mllm.py --out checkpoints/tiny-mllm          # hours on 2 cores
    python recipes/train_tiny_mllm.py --out /tmp/m --pool 2000 --tower-steps 20 --steps 20
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from patch_retriever.scenes.render import IMAGE_SIZE, render
from patch_retriever.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
)
from tiny_mllm.architecture import N_IMAGE_TOKENS, make_model, make_processor
from tiny_mllm.conversations import IGNORED, Conversation, Encoder, conversation
from tiny_mllm.measure import measure, write_card

LOG_EVERY = 100


def render_pool(seed: int, n: int) -> tuple[list[Scene], np.ndarray]:
    """`n` random training scenes and their pictures, uint8 (n, 72, 72, 3)."""
    rng = random.Random(f"train/{seed}")
    scenes = [sample_scene(rng, "train") for _ in range(n)]
    pixels_nhwc = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    with ProcessPoolExecutor() as pool:
        for i, picture in enumerate(pool.map(_pixels, scenes, chunksize=500)):
            pixels_nhwc[i] = picture
    return scenes, pixels_nhwc


def _pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene))


def to_pixel_values(pixels_nhwc: np.ndarray, augment: bool = False) -> Tensor:
    """Pictures as the processor gives them: float (n, 3, 72, 72) in [-1, 1].

    With `augment`, each is shifted by up to a pixel and lit a little differently, so that a
    picture is never seen twice.
    """
    x_nchw = torch.from_numpy(pixels_nhwc).permute(0, 3, 1, 2).float() / 127.5 - 1
    if augment:
        dx, dy = np.random.randint(-1, 2, size=2)
        x_nchw = torch.roll(x_nchw, (int(dy), int(dx)), dims=(2, 3))
        gain_n = 1 + 0.1 * (torch.rand(len(x_nchw), 1, 1, 1) - 0.5)
        x_nchw = ((x_nchw + 1) * gain_n - 1).clamp(-1, 1)
    return x_nchw


def attributes(scenes: list[Scene]) -> Tensor:
    """What stands in each cell, as class numbers (n, 9, 5): shape, colour, size, fill, background.

    An empty cell is class 0 of its first four attributes.
    """
    labels_nca = np.zeros((len(scenes), 9, 5), dtype=np.int64)
    for i, scene in enumerate(scenes):
        labels_nca[i, :, 4] = BACKGROUNDS.index(scene.background)
        for t in scene.things:
            labels_nca[i, t.place, :4] = (
                1 + SHAPES.index(t.shape),
                1 + COLOURS.index(t.colour),
                1 + SIZES.index(t.size),
                1 + FILLS.index(t.fill),
            )
    return torch.from_numpy(labels_nca)


class CellHead(nn.Module):
    """Attribute logits per cell from the patch tokens that cover it (thrown away after stage 1)."""

    n_classes = (
        len(SHAPES) + 1,
        len(COLOURS) + 1,
        len(SIZES) + 1,
        len(FILLS) + 1,
        len(BACKGROUNDS),
    )

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * width, sum(self.n_classes))

    def forward(self, tokens_npd: Tensor) -> list[Tensor]:
        """Logits (n, 9, classes) of each attribute from patch tokens (n, patches, width)."""
        n, p, d = tokens_npd.shape
        side = math.isqrt(p) // 3
        grid = tokens_npd.view(n, 3, side, 3, side, d).permute(0, 1, 3, 2, 4, 5)
        return list(self.linear(grid.reshape(n, len(PLACES), -1)).split(self.n_classes, dim=-1))


def optimise(
    groups: list[dict], steps: int, loss_of: Callable[[int], Tensor], label: str
) -> Iterator[int]:
    """AdamW with warm-up and cosine decay in bf16 autocast; `loss_of(step)` is one batch's loss.

    Yields the number of steps done, after each.
    """
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.03, fused=True)
    params = [p for group in groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / 200, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        schedule.step()
        running += float(loss.detach())
        if (step + 1) % LOG_EVERY == 0:
            seconds = time.perf_counter() - started
            print(
                f"{label} {step + 1}/{steps} loss {running / LOG_EVERY:.4f} {seconds:.0f} s",
                flush=True,
            )
            running = 0.0
        yield step + 1


def train_tower(model: Any, scenes: list[Scene], pixels: np.ndarray, steps: int) -> None:
    """Stage 1: the tower learns the attributes of every cell."""
    tower = model.model.vision_tower
    head = CellHead(model.config.vision_config.hidden_size)
    labels_nca = attributes(scenes)

    def loss_of(step: int) -> Tensor:
        picks = np.random.randint(0, len(scenes), size=256)
        features = tower(to_pixel_values(pixels[picks], augment=True), output_hidden_states=True)
        logits = head(features.hidden_states[-1])
        labels = labels_nca[picks]
        there = labels[..., 0] > 0
        losses = [
            nn.functional.cross_entropy(logits[0].flatten(0, 1).float(), labels[..., 0].flatten())
        ]
        losses += [
            nn.functional.cross_entropy(logits[a][there].float(), labels[..., a][there])
            for a in (1, 2, 3)
        ]
        losses += [
            nn.functional.cross_entropy(logits[4].flatten(0, 1).float(), labels[..., 4].flatten())
        ]
        if (step + 1) % 500 == 0:
            right = [
                f"{(logits[a][there].argmax(-1) == labels[..., a][there]).float().mean():.3f}"
                for a in range(4)
            ]
            print("  batch accuracy: shape, colour, size, fill", *right, flush=True)
        return torch.stack(losses).sum()

    params = [*tower.parameters(), *head.parameters()]
    for _ in optimise([{"params": params, "lr": 1.0e-3}], steps, loss_of, "tower"):
        pass


def batches(
    scenes: list[Scene], encoder: Encoder, seed: int, batch_size: int, text_share: float
) -> Iterator[list[tuple[int, Conversation]]]:
    """Endless batches of (scene number, conversation), each of similar length (less padding)."""
    rng = random.Random(f"conversations/{seed}")
    while True:
        drawn = []
        for _ in range(16 * batch_size):
            i = rng.randrange(len(scenes))
            with_image = rng.random() > text_share
            drawn.append((i, encoder.encode(conversation(rng, scenes[i], with_image))))
        drawn.sort(key=lambda pair: len(pair[1].ids))
        chunks = [drawn[k : k + batch_size] for k in range(0, len(drawn), batch_size)]
        rng.shuffle(chunks)
        yield from chunks


def train_language(
    model: Any,
    scenes: list[Scene],
    pixels: np.ndarray,
    encoder: Encoder,
    seed: int,
    steps: int,
) -> Iterator[int]:
    """Stage 2: everything, with the causal language-model loss on conversations."""
    stream = batches(scenes, encoder, seed, batch_size=80, text_share=0.2)

    def loss_of(_step: int) -> Tensor:
        batch = next(stream)
        ids, labels, attention = encoder.pad([c for _, c in batch])
        seen = [i for i, c in batch if c.with_image]
        hidden = model.model(
            input_ids=ids,
            attention_mask=attention,
            pixel_values=to_pixel_values(pixels[seen], augment=True) if seen else None,
        ).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != IGNORED  # the head runs only where something is to be said
        logits = model.lm_head(hidden[wanted])
        return nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])

    tower = list(model.model.vision_tower.parameters())
    in_tower = {id(p) for p in tower}
    rest = [p for p in model.parameters() if id(p) not in in_tower]
    groups = [{"params": rest, "lr": 1.5e-3}, {"params": tower, "lr": 3e-4}]
    return optimise(groups, steps, loss_of, "language")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", default=0, help="Seed of everything random.")
@click.option("--pool", default=160_000, help="Pictures rendered for training.")
@click.option("--tower-steps", default=1600, help="Steps of stage 1 (256 pictures each).")
@click.option("--steps", default=6500, help="Steps of stage 2 (80 conversations each).")
@click.option("--measure-on", default=400, help="Held-out scenes to measure on.")
def main(out: Path, seed: int, pool: int, tower_steps: int, steps: int, measure_on: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    started = time.perf_counter()
    scenes, pixels = render_pool(seed, pool)
    print(f"rendered {pool} pictures, {time.perf_counter() - started:.0f} s", flush=True)
    processor = make_processor(scenes[:20_000], seed)
    model = make_model(processor)
    model.set_attn_implementation("eager")  # its backward is much faster than sdpa's on a CPU
    train_tower(model, scenes, pixels, tower_steps)
    encoder = Encoder(processor, N_IMAGE_TOKENS)
    for done in train_language(model, scenes, pixels, encoder, seed, steps):
        if done % 500 == 0 or done == steps:
            save(model, processor, out)
    figures = measure(model.eval(), processor, "test", measure_on, seed)
    print(figures)
    write_card(
        out,
        figures,
        dict(seed=seed, pool=pool, tower_steps=tower_steps, steps=steps),
        time.perf_counter() - started,
    )


def save(model: Any, processor: Any, out: Path) -> None:
    """Write model (bf16 safetensors) and processor to `out`; the model in memory stays fp32."""
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    main()
