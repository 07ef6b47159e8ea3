"""The vendor's convolutions (cuDNN on a GPU), with the signatures of ours and recorded like ours."""

from __future__ import annotations

from typing import Any

import torch

from ..plan.problem import ConvProblem
from .record import note

_backward = torch.ops.aten.convolution_backward.default


def _geometry(problem: ConvProblem) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output_padding, groups."""
    return problem.stride, problem.padding, problem.dilation, False, (0, 0), problem.groups


def _nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def conv_fprop(x: torch.Tensor, weight: torch.Tensor, problem: ConvProblem) -> torch.Tensor:
    y = torch.convolution(x, weight, None, *_geometry(problem))
    note("vendor_conv_fprop", problem.flops, (x, weight, y), {})
    return _nhwc(y)


def conv_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, problem: ConvProblem
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dw by one call: two kernels all the same, and half of what the host pays for two calls."""
    dx, dw, _ = _backward(dy, x, weight, None, *_geometry(problem), (True, True, False))
    note("vendor_conv_wgrad", problem.flops, (x, dy, dw), {})
    note("vendor_conv_dgrad", problem.flops, (dy, weight, dx), {})
    return _nhwc(dx), _nhwc(dw)


def conv_dgrad(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, problem: ConvProblem) -> torch.Tensor:
    """``x`` gives the shape alone; it is not read."""
    dx = _backward(dy, x, weight, None, *_geometry(problem), (True, False, False))[0]
    note("vendor_conv_dgrad", problem.flops, (dy, weight, dx), {})
    return _nhwc(dx)


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    problem: ConvProblem,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``weight`` gives the shape and layout alone; the gradient comes in the activations' dtype, or a wider one.

    For that the operands are widened: the vendor rounds a result to its operands' dtype. Products of 16-bit values are
    exact in tf32, too.
    """
    wide = [t.to(out_dtype or t.dtype) for t in (x, dy, weight)]
    dw = _backward(wide[1], wide[0], wide[2], None, *_geometry(problem), (False, True, False))[1]
    widened = () if wide[0] is x else (x, dy, *wide[:2])
    note("vendor_conv_wgrad", problem.flops, (*wide[:2], dw, *widened), {})
    return _nhwc(dw)
