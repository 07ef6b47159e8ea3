"""What the benchmarks share: the GPU, or the reason to skip."""

from __future__ import annotations

import pytest
import torch

from benchmarks.device import Device


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The GPU's few calls; skips where there is none, since nothing is timed in an interpreter."""
    if not torch.cuda.is_available():
        pytest.skip("a kernel is timed on a GPU, and PyTorch finds none")
    return Device()
