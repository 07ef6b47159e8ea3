"""What this GPU is and what it can do: copy bandwidth and matrix rates on random data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..device import Device
from ..harness import Context, Item
from ..timing import Timing, interleave


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


def copy_timing(device: Device) -> tuple[float, Timing]:
    """Bytes per second, read and written, of a large copy."""
    elements = 2**10 if device.dry else 2**30
    source = torch.randn(elements, dtype=torch.bfloat16, device=device.name)
    target = torch.empty_like(source)
    timing = interleave(device, {"copy": [lambda: target.copy_(source)]})["copy"]
    return 4 * elements / (timing.us * 1e-6), timing


def matmul_timing(device: Device, dtype: torch.dtype) -> tuple[float, Timing]:
    """FLOPs per second of a large product."""
    n = 64 if device.dry else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=device.name) for _ in range(2))
    out = torch.empty_like(a)
    timing = interleave(device, {"matmul": [lambda: torch.mm(a, b.t(), out=out)]})["matmul"]
    return 2 * n**3 / (timing.us * 1e-6), timing


def _copy(context: Context) -> dict[str, Any]:
    rate, timing = copy_timing(context.device)
    _ceiling(context, "bytes_per_s", rate)
    return {"bytes_per_s": rate, **timing.to_dict(), "line": f"{rate / 1e12:.2f} TB/s, read + written"}


def _matmul(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    rate, timing = matmul_timing(context.device, dtype)
    _ceiling(context, "flops_per_s", rate)
    return _rate(rate, timing)


def _rate(rate: float, timing: Timing) -> dict[str, Any]:
    return {"flops_per_s": rate, **timing.to_dict(), "line": f"{rate / 1e12:.0f} TFLOP/s"}


def _tall(context: Context) -> dict[str, Any]:
    """The shape of a 1x1 convolution of the third stage: what the vendor's GEMM makes of it."""
    m, n, k = (64, 32, 16) if context.dry else (256 * 14 * 14, 1024, 256)
    a = torch.randn(m, k, dtype=torch.bfloat16, device=context.device.name)
    b = torch.randn(n, k, dtype=torch.bfloat16, device=context.device.name)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=context.device.name)
    timing = interleave(context.device, {"matmul": [lambda: torch.mm(a, b.t(), out=out)]})["matmul"]
    return _rate(2 * m * n * k / (timing.us * 1e-6), timing)
