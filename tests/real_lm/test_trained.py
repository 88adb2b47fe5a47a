"""What the trained model says about scenes that it was never shown (`make real-lm`)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny_mllm.measure import measure


@pytest.fixture(scope="module")
def figures(trained_real_llava):
    model = AutoModelForImageTextToText.from_pretrained(trained_real_llava, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(trained_real_llava, backend="pil")
    return measure(model.eval(), processor, "test", 40, seed=1)


@pytest.mark.parametrize("what", ["colour", "shape", "count"])
def test_it_names_what_is_there(figures, what):
    assert figures[what] >= 0.9
