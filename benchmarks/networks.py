"""Whole training steps, the candidates of the baselines and of the end-to-end comparison."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.launch.dependent import dependent_launches

from .device import Device
from .timing import Timing, interleave

Step = Callable[[], object]
LOSS_TOLERANCE = 0.02
"""Relative difference of the warm-up's losses: more than rounding in different places, less than a wrong gradient."""


def tiny_or(dry: bool, batch: int, size: int) -> tuple[int, int]:
    """Batch and image side; a rehearsal takes two small images."""
    return (2, 32) if dry else (batch, size)


def torchvision_resnet(depth: int, dry: bool) -> nn.Module:
    """torchvision's model; a rehearsal takes one narrow block."""
    from torchvision.models import resnet

    if dry:
        return tiny(resnet.Bottleneck if depth >= 50 else resnet.BasicBlock)
    return getattr(resnet, f"resnet{depth}")()


def fused_resnet(depth: int, dry: bool) -> nn.Module:
    """Ours, in the same way."""
    if dry:
        return tiny(fr.Bottleneck if depth >= 50 else fr.BasicBlock)
    return getattr(fr, f"resnet{depth}")()


def tiny(block: Any) -> nn.Module:
    """A stand-in that the interpreter runs in seconds."""
    planes = 16 // block.expansion
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), block(16, planes), *head)


class Training:
    """A training step: autocast forward, cross-entropy, backward, SGD with momentum over float32 parameters.

    Data is on the device already, 16-bit and channels_last. ``forward`` stands in for the model's own (a compiled one).
    ``dependent``: our launches are (launch/dependent.py).
    """

    def __init__(self, model: nn.Module, device: Device, batch: int, size: int, *, dtype: torch.dtype = torch.bfloat16,
                 compile_options: dict[str, Any] | None = None, route: str = "auto",
                 dependent: bool = False) -> None:  # fmt: skip
        self.device, self.batch, self.route, self.dependent = device, batch, route, dependent
        batch, size = tiny_or(device.dry, batch, size)
        if device.dry:
            dtype = torch.float32  # the interpreter has no bfloat16
        self.before = device.allocated()
        device.reset_peak()
        self.model = model.to(device.name).to(memory_format=torch.channels_last).train()
        self.forward: Callable[..., Any] = self.model
        if compile_options is not None:
            self.forward = torch.compile(self.model, **compile_options)
        x = torch.randn(batch, 3, size, size, device=device.name, dtype=dtype)
        self.x = x.to(memory_format=torch.channels_last)
        self.target = torch.randint(0, 10, (batch,), device=device.name)
        self.autocast = torch.autocast(device.name, dtype=dtype) if dtype != torch.float32 else nullcontext()
        fused = device.name == "cuda"
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=fused or None
        )
        self.loss = torch.zeros(())
        self.losses: list[float] = []
        """Of the warm-up's steps."""
        self.replay: Step | None = None

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with dependent_launches(self.dependent):
            with self.autocast, fr.use_route(self.route):
                loss = F.cross_entropy(self.forward(self.x), self.target)
            loss.backward()
        # Detached: a graph that outlives its step would keep gradient accumulators bound to that step's stream.
        self.loss = loss.detach()
        self.optimizer.step()

    def prepare(self, *, graph: bool = False, warmup: int = 5) -> Step:
        """Warms up (and captures); returns what one step is."""
        for _ in range(1 if self.device.dry else warmup):
            self.step()
            self.losses.append(float(self.loss))
        self.device.synchronize()
        if graph:
            self.optimizer.zero_grad(set_to_none=True)
            self.replay = self.device.capture(self.step)
            self.replay()
            self.device.synchronize()
        return self.replay or self.step

    def peak_bytes(self) -> int:
        """The most that was allocated since this candidate was built, beyond what stood before it."""
        return self.device.peak() - self.before


def compare(
    device: Device, candidates: dict[str, Training], steps: dict[str, Step], samples: int = 20
) -> dict[str, Any]:
    """The candidates take turns; images per second of each, and the ratio to the first."""
    timings = interleave(device, {name: [step] for name, step in steps.items()}, samples, hold=False)
    first = next(iter(timings.values()))
    return {name: row(candidates[name], timing, first) for name, timing in timings.items()}


def row(candidate: Training, timing: Timing, first: Timing) -> dict[str, Any]:
    return {
        "images_per_s": candidate.batch / (timing.us * 1e-6),
        "speedup": first.us / timing.us,
        "loss": float(candidate.loss.detach()),
        **timing.to_dict(),
    }


def line(results: dict[str, Any]) -> str:
    """``eager 2700/s 21.3 GB 1.00x | graph …``"""
    return " | ".join(
        f"{name} {r['images_per_s']:.0f}/s {r.get('peak_bytes', 0) / 2**30:.1f} GiB {r['speedup']:.2f}x"
        f" ±{100 * r['spread']:.0f}%"
        for name, r in results.items()
    )
