"""How far a 16-bit result may be from one of higher precision: against eager's own distance, and absolutely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

ABSOLUTE = {torch.bfloat16: 2**-7.5, torch.float16: 2**-10.5, torch.float32: 1e-5, torch.float64: 1e-12}
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20, torch.float64: 2.0**-45}


class Reference(NamedTuple):
    """What a result is judged by: its ``part``, where ``clear`` says that the ReLU's mask leaves no doubt."""

    part: Any
    eager: torch.Tensor
    oracle: torch.Tensor
    clear: torch.Tensor | None


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 convolutions and products without tf32, by the vendor's default algorithms."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark = before


@contextmanager
def poisoned() -> Iterator[None]:
    """Every fresh floating-point tensor is full of NaN, so that an element that nobody wrote shows."""
    originals = torch.empty, torch.empty_like

    def filling(make: Any) -> Any:
        def make_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

        return make_and_fill

    torch.empty, torch.empty_like = (filling(make) for make in originals)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals


def distance(result: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    """(relative RMS, largest absolute) difference; NaN and Inf anywhere make both infinite."""
    difference = result.to(oracle.dtype) - oracle
    if not bool(torch.isfinite(difference).all()):
        return float("inf"), float("inf")
    scale = torch.linalg.vector_norm(oracle).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(difference) / scale), float(difference.abs().max())


def judge(result: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor) -> dict[str, Any]:
    """The rule: R (1.10 x eager's), A (absolute), M (2 x eager's largest + one ulp); ``ok`` says whether all hold."""
    rms, largest = distance(result, oracle)
    eager_rms, eager_largest = distance(eager, oracle)
    dtype = result.dtype
    slack = 1.1 if oracle.numel() >= 4096 and dtype in (torch.bfloat16, torch.float16) else 2.0
    failed = []
    if not rms <= slack * eager_rms + 1e-6:
        failed.append("R")
    if not rms <= ABSOLUTE[dtype]:
        failed.append("A")
    if not largest <= 2 * eager_largest + ULP[dtype] * float(oracle.abs().max()):
        failed.append("M")
    return {"rms": rms, "eager_rms": eager_rms, "max": largest, "eager_max": eager_largest, "failed": "".join(failed),
            "ok": not failed}  # fmt: skip


def judge_exact(result: torch.Tensor, oracle: torch.Tensor) -> dict[str, Any]:
    """What has no rounding of its own but float32's: within 1e-5 of the oracle, relative RMS."""
    rms, largest = distance(result, oracle)
    return {"rms": rms, "max": largest, "failed": "" if rms <= 1e-5 else "A", "ok": rms <= 1e-5}


def judge_part(result: torch.Tensor, reference: Reference) -> dict[str, Any]:
    """:func:`judge` of what ``reference`` holds of a result."""
    part = result[reference.part].to(reference.eager.dtype)
    part = part if reference.clear is None else part * reference.clear
    return judge(part, reference.eager, reference.oracle)


def judge_sums(tiles: torch.Tensor, terms: torch.Tensor, most: float = 1e-5) -> dict[str, Any]:
    """Partial sums [T, C] of ``terms`` [rows, C], per channel: off by ``most`` of their absolute values' sum."""
    total, absolute = tiles.double().sum(0), terms.abs().sum(0, dtype=torch.float64)
    error = (total - terms.sum(0, dtype=torch.float64)).abs() / absolute.clamp_min(1e-30)
    worst = float(error.max()) if bool(torch.isfinite(error).all()) else float("inf")
    return {"rms": worst, "failed": "" if worst <= most else "S", "ok": worst <= most}


def judge_moments(data: torch.Tensor, rows_per_tile: int, y: torch.Tensor) -> dict[str, Any]:
    """Tiles (mean, M2) [2, T, C] of y [rows, C]: merged, against the moments of ``y`` as stored."""
    rows, count = y.shape[0], data.shape[1]
    counts = torch.full((count, 1), rows_per_tile, dtype=torch.float64, device=y.device)
    counts[-1] = rows - rows_per_tile * (count - 1)
    mean, m2 = data.double()
    merged = (mean * counts).sum(0) / rows
    variance = (m2 + counts * (mean - merged) ** 2).sum(0) / rows
    true_mean = y.sum(0, dtype=torch.float64) / rows
    true_variance = torch.stack([((part.double() - true_mean) ** 2).sum(0) for part in y.split(1 << 18)]).sum(0) / rows
    error = torch.maximum((merged - true_mean).abs() / true_variance.sqrt(), (variance / true_variance - 1).abs())
    worst = float(error.max()) if bool(torch.isfinite(error).all()) else float("inf")
    return {"rms": worst, "failed": "" if worst <= 1e-5 else "S", "ok": worst <= 1e-5}
