"""Memory formats: whether a tensor is in channels_last memory, and a copy that is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """Whether ``t``'s strides, those of a slice too, order its memory as NHWC: what PyTorch's own operations ask."""
    nhwc, nchw = t.is_contiguous(memory_format=torch.channels_last), t.is_contiguous()
    if nhwc != nchw or torch.compiler.is_compiling():  # Dynamo cannot tell the strides of a dynamic shape
        return nhwc and not nchw
    strides, least = t.stride(), 0
    if strides[1] == 0 or t.numel() == 0:
        return False
    for dim in (1, 3, 2, 0):
        if strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * t.shape[dim]
    return True


class _ToNHWC(torch.autograd.Function):
    """A copy in channels_last memory, whose gradient goes back in NCHW."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()


def nhwc(t: Tensor) -> Tensor:
    if t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous(memory_format=torch.channels_last) if is_channels_last(t) else _ToNHWC.apply(t)  # type: ignore[no-any-return]
