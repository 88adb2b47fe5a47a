"""Tiny SAEs that other packages saved, with their own codes: what the format tests compare with.

Each package has an environment of its own, and this script runs in it:

    python -m venv env
    env/bin/pip install sae-lens             # or eai-sparsify, dictionary-learning, overcomplete
    env/bin/python recipes/sae_formats/make_fixtures.py saelens tests/sae/formats/fixtures

PACKAGE is saelens, sparsify, dictionary_learning, overcomplete, or ours (in our environment). A
folder OUT/PACKAGE/CASE holds what the package wrote and `codes.safetensors`: activations `x`, and
the `codes` and `reconstruction` that the package gives after loading what it wrote. Where
torchvision does not fit the installed torch, `pip uninstall torchvision`: nothing here needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

D, C, K, N = 8, 16, 3, 12


def randomised(module: Any) -> Any:
    """The same module with random weights, which only depend on its class."""
    generator = torch.Generator().manual_seed(sum(map(ord, type(module).__name__)))
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return module


def write_codes(folder: Path, run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """What `run` gives, codes and reconstruction, for some activations."""
    x_nd = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        codes_nc, reconstruction_nd = run(x_nd)
    tensors = {"x": x_nd, "codes": codes_nc, "reconstruction": reconstruction_nd}
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, folder / "codes.safetensors")
    print(f"{folder}: {float((codes_nc != 0).sum(1).float().mean()):.1f} active of {C}")


def saelens(out: Path) -> None:
    import sae_lens

    def case(name: str, sae: Any, inference: bool = False, **load: Any) -> None:
        (sae.save_inference_model if inference else sae.save_model)(out / name)
        loaded = sae_lens.SAE.load_from_disk(out / name, **load)

        def run(x_nd: Tensor) -> tuple[Tensor, Tensor]:
            codes_nc = loaded.encode(x_nd)
            return codes_nc, loaded.decode(codes_nc)

        write_codes(out / name, run)

    size: dict[str, Any] = {"d_in": D, "d_sae": C}
    gated = {**size, "k": K, "normalize_activations": "none"}
    standard = sae_lens.StandardSAEConfig
    case("standard", randomised(sae_lens.StandardSAE(standard(**size))))
    raw = standard(**size, apply_b_dec_to_input=False)
    case("standard_raw", randomised(sae_lens.StandardSAE(raw)))
    half = standard(**size, dtype="bfloat16")
    case("standard_bfloat16", randomised(sae_lens.StandardSAE(half)), dtype="float32")
    layer_norm = standard(**size, normalize_activations="layer_norm")
    case("standard_layer_norm", randomised(sae_lens.StandardSAE(layer_norm)))
    case("topk", randomised(sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**gated))))
    rescaled = sae_lens.TopKTrainingSAEConfig(**gated, rescale_acts_by_decoder_norm=True)
    case("topk_rescaled", randomised(sae_lens.TopKTrainingSAE(rescaled)))
    case("jumprelu", randomised(sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**size))))
    by_token = sae_lens.JumpReLUSAEConfig(**size, normalize_activations="layer_norm")
    case("jumprelu_layer_norm", randomised(sae_lens.JumpReLUSAE(by_token)))
    by_token = sae_lens.TopKSAEConfig(**{**gated, "normalize_activations": "layer_norm"})
    case("topk_layer_norm", randomised(sae_lens.TopKSAE(by_token)))
    batch = randomised(sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**gated)))
    batch.topk_threshold.fill_(0.7)
    case("batchtopk", batch, inference=True)
    nested = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**gated, matryoshka_widths=[4, 8, C])
    matryoshka = randomised(sae_lens.MatryoshkaBatchTopKTrainingSAE(nested))
    matryoshka.topk_threshold.fill_(0.7)
    case("matryoshka", matryoshka, inference=True)


def sparsify(out: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, settings in (("topk", {}), ("multi_topk", {"multi_topk": True})):
        config = SparseCoderConfig(num_latents=C, k=K, **settings)
        randomised(SparseCoder(D, config)).save_to_disk(out / name)
        sae = SparseCoder.load_from_disk(out / name)

        def run(x_nd: Tensor, sae: Any = sae) -> tuple[Tensor, Tensor]:
            values_nk, concepts_nk, _ = sae.encode(x_nd)
            codes_nc = torch.zeros(N, C).scatter_(1, concepts_nk, values_nk)
            return codes_nc, sae.decode(values_nk, concepts_nk)

        write_codes(out / name, run)


def dictionary_learning(out: Path) -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import (
        batch_top_k,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    def case(
        name: str, trainer: type, make: type, threshold: float | None = None, **options: Any
    ) -> None:
        def made(*sizes: Any, **named: Any) -> nn.Module:
            sae = randomised(make(*sizes, **named))
            if threshold is not None:
                sae.threshold.fill_(threshold)
            return sae

        settings = {
            "trainer": trainer,
            "dict_class": made,
            "activation_dim": D,
            "dict_size": C,
            "steps": 5000,
            "layer": 0,
            "lm_name": "none",
            "device": "cpu",
            **options,
        }
        # the package saves at the end of a training, which here has no steps
        trainSAE([], [settings], steps=0, save_dir=str(out / name), device="cpu")
        for file in (out / name / "trainer_0").iterdir():
            file.replace(out / name / file.name)
        (out / name / "trainer_0").rmdir()
        sae, _ = load_dictionary(str(out / name), "cpu")

        def run(x_nd: Tensor) -> tuple[Tensor, Tensor]:
            codes_nc = sae.encode(x_nd)
            return codes_nc, sae.decode(codes_nc)

        write_codes(out / name, run)

    batch = (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE)
    nested = (
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
    )
    case("standard", standard.StandardTrainer, dictionary.AutoEncoder)
    case("topk", top_k.TopKTrainer, top_k.AutoEncoderTopK, 2.0, k=K)
    case("batch_topk", *batch, 0.7, k=K)
    case("batch_topk_without_threshold", *batch, k=K)
    case("matryoshka", *nested, 0.7, k=K, group_fractions=[0.25, 0.75])
    case("jumprelu", jumprelu.JumpReluTrainer, dictionary.JumpReluAutoEncoder)


def overcomplete(out: Path) -> None:
    # its __init__ imports image models and plots, and with them packages that SAEs don't need
    for name in ("models", "visualization"):
        sys.modules[f"overcomplete.{name}"] = MagicMock()
    from overcomplete.sae import TopKSAE

    for name in ("state", "model_state"):
        sae = randomised(TopKSAE(D, C, top_k=K, dictionary_params={"use_multiplier": True}))
        state = sae.state_dict()
        # the package leaves saving to its users; the official checkpoint holds "model_state"
        (out / name).mkdir(parents=True, exist_ok=True)
        torch.save(
            {"model_state": state} if name == "model_state" else state, out / name / "sae.pt"
        )
        loaded = TopKSAE(D, C, top_k=K)
        saved = torch.load(out / name / "sae.pt", weights_only=True)
        loaded.load_state_dict(saved.get("model_state", saved))
        loaded.eval()

        def run(x_nd: Tensor, sae: Any = loaded) -> tuple[Tensor, Tensor]:
            _, codes_nc = sae.encode(x_nd)
            return codes_nc, sae.decode(codes_nc)

        write_codes(out / name, run)


def ours(out: Path) -> None:
    from patch_retriever.sae.formats import load_sae, save_sae
    from patch_retriever.sae.model import SparseAutoencoder
    from patch_retriever.sae.scale import InputScale

    cases: list[tuple[str, int | None, InputScale]]
    cases = [("jumprelu", None, "none"), ("topk", K, "none"), ("token", None, "token")]
    for name, k, scale in cases:
        generator = torch.Generator().manual_seed(1)
        shapes = ((D, C), (C,), (C, D), (D,), (C,))
        W_enc, b_enc, W_dec, b_dec, u = (torch.randn(*s, generator=generator) * 0.5 for s in shapes)
        sae = SparseAutoencoder(W_enc, b_enc, W_dec, b_dec, u.abs(), k, scale)
        save_sae(sae, out / name, {"fvu": 0.25})
        loaded = load_sae(out / name)

        def run(x_nd: Tensor, sae: SparseAutoencoder = loaded) -> tuple[Tensor, Tensor]:
            codes_nc = sae.encode(x_nd)
            reconstruction_nd = sae.decode(codes_nc, x_nd)
            scale_n = sae.scale(x_nd)  # SAELens' codes are of standardised tokens
            return codes_nc if scale_n is None else codes_nc / scale_n[:, None], reconstruction_nd

        write_codes(out / name, run)


PACKAGES = {f.__name__: f for f in (saelens, sparsify, dictionary_learning, overcomplete, ours)}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PACKAGES:
        sys.exit(f"usage: make_fixtures.py {'|'.join(PACKAGES)} OUT")
    PACKAGES[sys.argv[1]](Path(sys.argv[2], sys.argv[1]))
