"""torchvision for the tests of families whose processors need it.

torchvision from the package registry is built for CUDA: beside a CPU build of torch its compiled
operators do not load, and importing it fails on two that are not there. None of the processors
uses them, so declaring them is enough. A process without this fails at its first import of
transformers where such a torchvision is installed. So it is kept in a folder of its own, named by
TORCHVISION_FOR_TESTS, that only the test process sees:

    pip install --target FOLDER --no-deps torchvision num2words
    TORCHVISION_FOR_TESTS=FOLDER pytest -m torchvision

`make test-families` does both. Processes that tests start see it likewise (tests/fresh.py).
"""

from __future__ import annotations

import os
import sys
import warnings

VARIABLE = "TORCHVISION_FOR_TESTS"
_kept = []


def use_torchvision() -> None:
    """Make torchvision importable; to be called before transformers is imported."""
    folder = os.environ.get(VARIABLE)
    if not folder or folder in sys.path:
        return
    import torch

    sys.path.append(folder)
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # what it declares is gone with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its image reader did not load
        import torchvision  # noqa: F401
