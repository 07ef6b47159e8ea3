"""What every launcher requires of its tensors, said clearly before any kernel runs.

Only metadata is looked at, never data: the checks hold on ``meta`` tensors and do not synchronise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl

from ..plan.problem import ConvProblem

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
ACCUMULATION = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES.values()}


def require_nhwc(t: torch.Tensor, name: str = "tensor") -> None:
    """A logical NCHW tensor whose memory is dense NHWC (strides of size-1 dimensions do not count), or ValueError."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return
    if t.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(t.shape)}")
    if not t.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(
            f"{name} must be dense in channels_last memory, got shape {tuple(t.shape)} with strides {t.stride()}"
        )


def require_shape(t: torch.Tensor, shape: Sequence[int], name: str = "tensor") -> None:
    """ValueError unless ``t`` has exactly ``shape``."""
    if t.shape != shape and tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def require_dtype(t: torch.Tensor, dtype: torch.dtype, name: str = "tensor") -> None:
    """ValueError unless ``t`` has ``dtype``."""
    if t.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {t.dtype}")


def require_device(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """ValueError unless every tensor that is given lives on ``device``."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on {device}, got {t.device}")


def require_image(t: torch.Tensor, shape: Sequence[int], like: torch.Tensor, name: str = "tensor") -> None:
    """An activation or weight: ``shape``, dense NHWC memory, and the dtype and device of ``like``."""
    fits = t.shape == shape and t.dtype == like.dtype and t.device == like.device
    if fits and t.is_contiguous(memory_format=torch.channels_last):
        return  # the checks below find the words
    require_shape(t, shape, name)
    require_nhwc(t, name)
    require_dtype(t, like.dtype, name)
    require_device(like.device, **{name: t})


def require_rows(t: torch.Tensor, rows: int, channels: int, like: torch.Tensor, name: str = "tensor") -> None:
    """Per-channel numbers [rows, channels], contiguous, in ``like``'s accumulation dtype, on its device."""
    fits = t.shape == (rows, channels) and t.dtype == ACCUMULATION.get(like.dtype) and t.device == like.device
    if fits and t.is_contiguous():
        return  # the checks below find the words
    require_shape(t, (rows, channels), name)
    require_dtype(t, accumulation_dtype(like.dtype), name)
    require_device(like.device, **{name: t})
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def require_mean(t: torch.Tensor, like: torch.Tensor, name: str = "input_mean") -> None:
    """What is subtracted from every pixel of ``like`` [N, C, H, W], or from what is formed of it: [C], in its dtype.

    ValueError otherwise, and for 16-bit data, which a kernel would have to round once more.
    """
    require_rows(t[None], 1, like.shape[1], like, name)
    require_dtype(like, accumulation_dtype(like.dtype), f"what {name} is subtracted from")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators and statistics: float64 for float64 data, else float32. ValueError for other dtypes."""
    if dtype not in ACCUMULATION:
        raise ValueError(f"the kernels take {', '.join(DTYPES)}; got {dtype}")
    return ACCUMULATION[dtype]


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's word for a dtype of accumulators and statistics."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def require_counter(counter: torch.Tensor | None, device: torch.device) -> None:
    """How many batches a BatchNorm has seen: int64, on ``device``."""
    if counter is not None:
        if counter.dtype != torch.int64:
            raise ValueError(f"counter must be int64, got {counter.dtype}")
        require_device(device, counter=counter)


def allows_tf32() -> bool:
    """PyTorch's own switch, of convolutions of float32: ``cudnn.allow_tf32`` raises once ``fp32_precision`` was set."""
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"  # type: ignore[no-any-return, attr-defined]


def dot_precision(dtype: torch.dtype = torch.float32) -> str:
    """How tl.dot multiplies operands of a convolution: float32 after PyTorch's own switch, all others exactly."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def require_problem(problem: ConvProblem, dtype: torch.dtype) -> None:
    """A convolution that the implicit GEMM kernels compute, in ``dtype``. ValueError if not."""
    if DTYPES.get(problem.dtype) != dtype:
        raise ValueError(f"the problem is described in {problem.dtype}, the tensors are {dtype}")
    if problem.groups != 1:
        raise ValueError(f"the kernels take ungrouped convolutions, got groups={problem.groups}")
    if problem.taps > 63:
        raise ValueError(f"the kernels take filters of at most 63 taps, got {problem.R}x{problem.S}")
    if problem.P < 1 or problem.Q < 1:
        raise ValueError(f"the filter does not fit into the padded input: {problem}")
    if max(problem.M, problem.N * problem.H * problem.W, problem.Co * problem.Ci * problem.taps) >= 2**31:
        raise ValueError(f"the kernels count pixels and weights in 32 bits, too many for them: {problem}")
