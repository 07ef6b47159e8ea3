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


def conv_wgrad(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, problem: ConvProblem) -> torch.Tensor:
    """``weight`` gives the shape and layout alone; the gradient comes in the activations' dtype."""
    dw = _backward(dy, x, weight, None, *_geometry(problem), (False, True, False))[1]
    note("vendor_conv_wgrad", problem.flops, (x, dy, dw), {})
    return _nhwc(dw)
