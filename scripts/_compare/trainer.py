"""One model in training: its optimizer, its learning rate, its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import data
import torch
from torch import Tensor, nn

WARM_UP = 0.25  # of all steps; a slow one keeps the compared steps from magnifying rounding errors


class Trainer:
    """A model with SGD (momentum, Nesterov) under a learning rate that warms up, then falls to zero over the run."""

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str,
        device: torch.device,
        lr: float,
        total: int,
        compile_mode: str = "off",
    ) -> None:
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward: Callable[[Tensor], Tensor] = self.model
        if compile_mode != "off":
            self.forward = torch.compile(self.model, mode=compile_mode)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=device.type == "cuda"
        )
        self.dtype, self.device, self.lr, self.total, self.taken = dtype, device, lr, max(total, 1), 0
        self.autocast = getattr(torch, precision) if precision in ("bfloat16", "float16") else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    def _context(self) -> Any:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; returns the loss, not waiting for the device."""
        done = self.taken / self.total
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min((self.taken + 1) / (WARM_UP * self.total), max(1.0 - done, 0.01), 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        with self._context():
            loss = nn.functional.cross_entropy(self.forward(images.to(self.dtype)), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.taken += 1
        return loss.detach()

    def accuracy(self, batches: Iterator[data.Batch]) -> float:
        """Share of images whose class comes first, with running statistics."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        count = 0
        with torch.no_grad(), self._context():
            for images, labels in batches:
                right += (self.model(images.to(self.dtype)).argmax(1) == labels).sum()
                count += len(labels)
        self.model.train()
        return right.item() / count
