"""Projector and LoRA, trained with the causal language-model loss; a killed training goes on.

The tower stays as it is. So do the language model's own weights, which are in bf16, where the CPU
multiplies in it, while LoRA is trained beside them; at the end LoRA is added to them in float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from patch_retriever.errors import UserError
from patch_retriever.files import write_tensors
from real_lm.chatml import ChatMLEncoder
from real_lm.lessons import Lesson, captions, lessons
from tiny_mllm.conversations import IGNORED

CHECKPOINT = "training.safetensors"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BETAS = (0.9, 0.98)
WARM_UP = 30
"""Steps over which the rate rises."""
DECAY = 0.25
"""Of all steps, at the end, over which it falls to nothing; between it is constant, so that the
number of steps may be changed while a training runs."""
LOG_EVERY = 20
LOOK_EVERY = 100
"""Steps between looks at held-out scenes."""


@dataclass(frozen=True)
class TrainingSettings:
    """What decides the weights beside the number of steps, which may change on the way."""

    seed: int = 0
    batch_size: int = 8
    """Conversations a step."""
    rank: int = 32
    """Of LoRA, on every linear layer of the language model."""
    lora_rate: float = 1e-3
    projector_rate: float = 3e-4


class Training:
    """One training in a folder; `run` does what is left of it.

    Args:
        model: a LLaVA in float32 whose projector is warm; its weights change.
        encoder: of its tokenizer.
        folder: where the checkpoint lies.
        settings: those of a checkpoint that is there, too.

    Raises:
        UserError: the checkpoint there has other settings.
    """

    def __init__(
        self, model: Any, encoder: ChatMLEncoder, folder: Path, settings: TrainingSettings
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.settings, self._encoder = settings, encoder
        self._path = folder / CHECKPOINT
        self._model = model.requires_grad_(False)
        model.set_attn_implementation("eager")  # its backward is faster than sdpa's on a CPU
        own = model.model.language_model
        self._exact = {name: p.detach().clone() for name, p in own.named_parameters()}
        if has_bf16():  # so that they need not be cast at every step
            for module in own.layers.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        lora = LoraConfig(
            r=settings.rank, lora_alpha=settings.rank, target_modules=list(LINEARS), lora_dropout=0
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self._lora: Any = get_peft_model(own, lora, autocast_adapter_dtype=True)
        self._projector = model.model.multi_modal_projector.requires_grad_(True)
        groups = {
            settings.lora_rate: [p for p in self._lora.parameters() if p.requires_grad],
            settings.projector_rate: list(self._projector.parameters()),
        }
        self._optimiser = torch.optim.AdamW(
            [{"params": params, "lr": rate, "rate": rate} for rate, params in groups.items()],
            betas=BETAS,
            weight_decay=0.01,
            fused=True,
        )
        self.step, self.seconds = 0, 0.0
        self._resume()

    def run(self, steps: int, save_every: float, say: Callable[[str], None]) -> None:
        """Train up to step `steps`, with a checkpoint every `save_every` seconds."""
        held_out = captions(self._encoder, "validation", self.settings.seed, 32)
        saved = lap = time.perf_counter()
        losses: list[float] = []
        stream = lessons(
            self._encoder, self.settings.seed, self.settings.batch_size, self.step, steps
        )
        for lesson in stream:
            losses.append(self._learn(lesson, rate_at(self.step, steps)))
            self.step += 1
            now = time.perf_counter()
            self.seconds, lap = self.seconds + now - lap, now
            if self.step % LOG_EVERY == 0:
                mean = sum(losses) / len(losses)
                say(f"step {self.step}/{steps}: loss {mean:.3f}, {self.seconds:.0f} s")
                losses = []
            if self.step % LOOK_EVERY == 0:
                loss, right = self.look(held_out)
                say(f"held-out captions: loss {loss:.3f}, next token right {right:.3f}")
            if now - saved > save_every or self.step == steps:
                self._save()
                saved = now

    def _learn(self, lesson: Lesson, rate: float) -> float:
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        logits_kv, label_k = self._answers(lesson)
        loss = nn.functional.cross_entropy(logits_kv.float(), label_k)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        params = [p for group in self._optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, 1.0)
        self._optimiser.step()
        return float(loss.detach())

    @torch.no_grad()
    def look(self, lesson: Lesson) -> tuple[float, float]:
        """Loss, and share of answered tokens that are the likeliest after the right ones."""
        logits_kv, label_k = self._answers(lesson)
        right = (logits_kv.argmax(dim=-1) == label_k).float().mean()
        return float(nn.functional.cross_entropy(logits_kv.float(), label_k)), float(right)

    def _answers(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Logits and labels of the k tokens that the assistant says."""
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            hidden_ntd = self._model.model(
                input_ids=lesson.ids_nt,
                attention_mask=lesson.mask_nt,
                pixel_values=lesson.pixels_nchw,
                use_cache=False,
            ).last_hidden_state[:, :-1]
            wanted_nt = lesson.labels_nt[:, 1:] != IGNORED
            logits_kv = self._model.lm_head(hidden_ntd[wanted_nt])
        return logits_kv, lesson.labels_nt[:, 1:][wanted_nt]

    def finish(self) -> Any:
        """The model in float32 with LoRA added to the language model's own weights.

        The training is over for this object; its checkpoint stays.
        """
        own = self._lora.get_base_model()
        for name, parameter in own.named_parameters():
            if (exact := self._exact.get(name.replace(".base_layer", ""))) is not None:
                parameter.data = exact
        self._model.model.language_model = self._lora.merge_and_unload()
        self._model.set_attn_implementation("sdpa")
        return self._model.requires_grad_(False).eval()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trained().items():
            state = self._optimiser.state[parameter]
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
            tensors[name] = parameter
        about = {"step": self.step, "seconds": self.seconds, "settings": asdict(self.settings)}
        write_tensors(self._path, tensors, {"training": json.dumps(about)})

    def _resume(self) -> None:
        if not self._path.is_file():
            return
        with safe_open(self._path, "pt") as file:
            about = json.loads(file.metadata()["training"])
        if about["settings"] != asdict(self.settings):
            raise UserError(
                f"{self._path}: of a training with other settings ({about['settings']}); "
                "delete it to begin anew, or name another folder"
            )
        tensors = load_file(self._path)
        for name, parameter in self._trained().items():
            parameter.data.copy_(tensors[name])
            self._optimiser.state[parameter] = {
                key: tensors[stored]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (stored := f"{name}/{key}") in tensors
            }
        self.step, self.seconds = about["step"], about["seconds"]


def rate_at(step: int, steps: int) -> float:
    """The learning rate's factor: up, constant, and down to nothing over the last `DECAY`."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1.0, DECAY * steps))


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (elsewhere autocast would only slow it down)."""
    return bool(torch.cpu._is_avx512_bf16_supported())
