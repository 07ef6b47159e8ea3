"""Random tensors in the layout that the kernels take: logical NCHW, memory dense NHWC."""

from __future__ import annotations

import torch

from fused_resnet.launch.bits import bits_shape
from fused_resnet.plan.problem import ConvProblem


def image(n: int, c: int, h: int, w: int, dtype: str | torch.dtype, device: str, shift: float = 0.0) -> torch.Tensor:
    """Standard normal (plus ``shift``), [n, c, h, w] over NHWC memory."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    memory = torch.randn(n, h, w, c, dtype=dtype, device=device)
    return (memory + shift if shift else memory).permute(0, 3, 1, 2)


def weight(problem: ConvProblem, device: str, dtype: str | torch.dtype | None = None) -> torch.Tensor:
    """Kaiming's scale (fan in), [Co, Ci, R, S] over [Co, R, S, Ci] memory."""
    ci = problem.Ci // problem.groups
    w = image(problem.Co, ci, problem.R, problem.S, dtype or problem.dtype, device)
    return w * (2.0 / (ci * problem.taps)) ** 0.5


def channels(rows: int, c: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Per-channel numbers near 1, [rows, c]."""
    return 1.0 + 0.2 * torch.randn(rows, c, dtype=dtype, device=device)


def relu_bits(out: torch.Tensor) -> torch.Tensor:
    """Where a ReLU with the output ``out`` [n, c, h, w] lets the gradient through, as the kernels take it."""
    passed = ~(out <= 0).permute(0, 2, 3, 1).flatten(0, 2)
    bits = torch.zeros(bits_shape(out.shape), dtype=torch.uint8, device=out.device)
    for bit in range(8):
        column = passed[:, bit::8]
        bits[:, : column.shape[1]] |= column.to(torch.uint8) << bit
    return bits


def products(p: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A P of the Gram route [terms, p, p]: of 16 bits two terms, the second what the first leaves."""
    whole = torch.randn((p, p), dtype=torch.float32, device=device) * 0.01
    first = whole.to(dtype)
    return torch.stack([first, (whole - first).to(dtype)]) if dtype.itemsize == 2 else first[None]


def whole(terms: torch.Tensor) -> torch.Tensor:
    """The matrix that the terms add up to."""
    return terms.to(torch.promote_types(terms.dtype, torch.float32)).sum(0)
