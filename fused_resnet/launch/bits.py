"""The mask of a ReLU as one bit per element: [rows, ceil(channels / 8)] bytes, bit j of byte b for channel 8b + j."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan.passes import ceil_div
from .check import require_device, require_dtype, require_shape


def bits_shape(shape: Sequence[int]) -> tuple[int, int]:
    """[rows, bytes of a row] for an image of ``shape`` [N, C, H, W]."""
    n, channels, height, width = shape
    return n * height * width, ceil_div(channels, 8)


def empty_bits(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Memory for the mask of an image of ``shape`` [N, C, H, W]."""
    return torch.empty(bits_shape(shape), dtype=torch.uint8, device=device)


def require_bits(bits: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    """ValueError unless ``bits`` are the mask of an image of ``shape`` on ``device``."""
    require_shape(bits, bits_shape(shape), "bits")
    require_dtype(bits, torch.uint8, "bits")
    require_device(device, bits=bits)
    if not bits.is_contiguous():
        raise ValueError(f"bits must be contiguous, got strides {bits.stride()}")
