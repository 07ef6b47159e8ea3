"""Tiles of the gradient of a 1x1 convolution's input by its Gram matrix."""

from __future__ import annotations

from .config import GemmConfig
from .target import Target


def gram_dgrad_config(rows: int, p: int, q: int, target: Target, *, itemsize: int = 2) -> GemmConfig:
    """Rows by the ``p`` channels below, reduced over ``q`` + ``p``.

    Up to 128 channels the kernel waits for memory, and one N tile must hold all of p, or dz is read twice.
    """
    if target.interpreter:
        block_n = min(max(16, 1 << (p - 1).bit_length()), 128)
        return GemmConfig(128 if rows > 4096 else 32, block_n, 64 if q >= 64 else 16, num_warps=4)
    if itemsize > 2:
        narrow = p <= 64 or not target.has_group_products
        return GemmConfig(64, 64 if narrow else 128, 32, num_warps=4 if narrow else 8, num_stages=3)
    if not target.has_group_products:  # a and both terms of P lie in registers
        block_m, block_n, num_warps = (128, 64, 4) if p <= 64 else (64, 128, 8)
        return GemmConfig(block_m, block_n, 32, num_warps, num_stages=4)
    if p <= 64:
        return GemmConfig(128, 64, 64, num_warps=4, num_stages=3, maxnreg=168)
    if p <= 128:
        return GemmConfig(128, 128, 64, num_warps=8, num_stages=3, maxnreg=128)
    if p % 256 == 0 and rows // 128 * (p // 256) >= 2 * target.sm_count:
        return GemmConfig(128, 256, 64, num_warps=8, num_stages=3)
    return GemmConfig(128, 128, 64, num_warps=8, num_stages=4)
