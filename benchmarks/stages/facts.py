"""What this GPU is and what it can do: copy bandwidth and matrix rates on random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..harness import Context, Item
from ..timing import interleave


def items(context: Context) -> Iterator[Item]:
    yield "device", lambda: _device(context)
    yield "copy", lambda: _copy(context)
    yield "matmul bfloat16", lambda: _matmul(context, torch.bfloat16)
    yield "matmul float16", lambda: _matmul(context, torch.float16)
    yield "matmul tall bfloat16", lambda: _tall(context)


def _device(context: Context) -> dict[str, Any]:
    facts = context.document["facts"]
    keys = ("gpu", "driver", "torch", "triton", "cuda", "cudnn", "commit")
    return {"line": ", ".join(f"{key} {facts.get(key)}" for key in keys)}


def _ceiling(context: Context, key: str, value: float) -> None:
    ceilings = context.document.setdefault("ceilings", {})
    ceilings[key] = max(value, ceilings.get(key, 0.0))


def _copy(context: Context) -> dict[str, Any]:
    elements = 2**10 if context.dry else 2**30
    source = torch.randn(elements, dtype=torch.bfloat16, device=context.device.name)
    target = torch.empty_like(source)
    timing = interleave(context.device, {"copy": [lambda: target.copy_(source)]})["copy"]
    rate = 4 * elements / (timing.us * 1e-6)
    _ceiling(context, "bytes_per_s", rate)
    return {"bytes_per_s": rate, **timing.to_dict(), "line": f"{rate / 1e12:.2f} TB/s, read + written"}


def _rate(context: Context, call: Callable[[], object], flops: int) -> dict[str, Any]:
    timing = interleave(context.device, {"matmul": [call]})["matmul"]
    rate = flops / (timing.us * 1e-6)
    return {"flops_per_s": rate, **timing.to_dict(), "line": f"{rate / 1e12:.0f} TFLOP/s"}


def _matmul(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    n = 64 if context.dry else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=context.device.name) for _ in range(2))
    out = torch.empty_like(a)
    result = _rate(context, lambda: torch.mm(a, b.t(), out=out), 2 * n**3)
    _ceiling(context, "flops_per_s", result["flops_per_s"])
    return result


def _tall(context: Context) -> dict[str, Any]:
    """The shape of a 1x1 convolution of the third stage: what the vendor's GEMM makes of it."""
    m, n, k = (64, 32, 16) if context.dry else (256 * 14 * 14, 1024, 256)
    a = torch.randn(m, k, dtype=torch.bfloat16, device=context.device.name)
    b = torch.randn(n, k, dtype=torch.bfloat16, device=context.device.name)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=context.device.name)
    return _rate(context, lambda: torch.mm(a, b.t(), out=out), 2 * m * n * k)
