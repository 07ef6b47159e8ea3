"""One training step of ResNet-50 and ResNet-18, batch 256, 224 pixels: eager and fused, each also in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import networks
from benchmarks.device import Device
from benchmarks.timing import interleave

ROUNDS = 20


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("who", ["torchvision", "fused"])
@pytest.mark.parametrize("depth", [50, 18])
def bench_step(benchmark: Any, gpu: Device, depth: int, who: str, graph: bool) -> None:
    benchmark.group = f"resnet{depth}, batch 256, 224 px, bfloat16"
    torch.manual_seed(0)
    model = (networks.fused_resnet if who == "fused" else networks.torchvision_resnet)(depth, False)
    training = networks.Training(model, gpu, 256, 224)
    step = training.prepare(graph=graph)
    timing = interleave(gpu, {who: [step]}, ROUNDS, hold=False)[who]

    def synchronous() -> None:
        step()
        gpu.synchronize()

    benchmark.pedantic(synchronous, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    benchmark.extra_info |= {
        "device_us": timing.us,
        "images_per_s": 256 / timing.us * 1e6,
        "peak_bytes": training.peak_bytes(),
        "loss": float(training.loss),
    }
