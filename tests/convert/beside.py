"""A converted model beside the same model as it was: small networks, in the interpreter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from tests.conftest import INTERPRETED
from tests.eager import agree

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")
Results = dict[str, "Tensor | None"]


class Home(nn.Module):
    """A block of nobody's family, with whatever a test needs."""

    factor = 1.0
    with_cp = False

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp:
            return self.act(self.factor * checkpoint(self.branch, x, use_reentrant=False) + x)
        return self.act(self.factor * self.branch(x) + x)


def drawn(model: nn.Module) -> nn.Module:
    """``model`` in float64, its normalisations with numbers that hide nothing."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.dim() == 1 and t.is_floating_point():
            low = 0.5 if name.endswith(("weight", "var")) else -0.3
            t.data.uniform_(low, low + 0.8)
    return model.double()


def results(model: nn.Module, x: Tensor) -> Results:
    """Outputs, gradients, buffers; random numbers inside are the same at every call."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    outs = _tensors(model(x))
    torch.manual_seed(4)
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    found: Results = {f"out{i}": out.detach() for i, out in enumerate(outs)} | {"dx": x.grad}
    return found | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


def same(ours: nn.Module, theirs: nn.Module, x: Tensor, fused: bool = True) -> list[fr.Launch]:
    """Both models' results agree; kernels ran in ours if ``fused``, and none did otherwise."""
    with fr.record_launches() as launches:
        mine = results(ours, x)
    agree(mine, results(theirs, x))
    assert bool(launches) == fused
    return launches


def converted(model: nn.Module, x: Tensor, fused: bool = True, evaluation: bool = True) -> tuple[nn.Module, fr.Report]:
    """``model`` after its conversion, proven equal to itself before, in training and (quicker) in evaluation."""
    theirs = copy.deepcopy(model)
    report = fr.convert(model)
    same(model, theirs, x, fused)
    if evaluation:
        with torch.no_grad():
            for mine, other in zip(_tensors(model.eval()(x)), _tensors(theirs.eval()(x)), strict=True):
                torch.testing.assert_close(mine, other)
        model.train()
    return model, report


def image(channels: int = 3, size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def reasons(report: fr.Report) -> dict[str, str]:
    return dict(report.kept)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [t for value in values if value is not None for t in _tensors(value)]
