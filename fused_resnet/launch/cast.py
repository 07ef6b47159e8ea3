"""Launcher of the cast of a chain's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.cast import cast_kernel
from ..plan.passes import cast_config, ceil_div
from ..plan.target import interprets
from .check import require_device, require_nhwc
from .record import launch

MOST_TENSORS = 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_castable(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`cast` takes ``t``: a dense NHWC tensor, and not float64 (16 bits would round it twice)."""
    return t.dtype in FLOATS and dtype in FLOATS and t.permute(0, 2, 3, 1).is_contiguous()


def cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies of up to four NHWC tensors in ``dtype``, rounded to nearest even, by one launch."""
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"cast takes up to {MOST_TENSORS} tensors, got {len(tensors)}")
    if not tensors:
        return []
    device = tensors[0].device
    for t in tensors:
        require_nhwc(t)
        require_device(device, tensor=t)
        if t.dtype not in FLOATS or dtype not in FLOATS:
            raise ValueError(f"cast takes {', '.join(map(str, FLOATS))}, got {t.dtype} to {dtype}")
    outs = [torch.empty(t.shape, dtype=dtype, device=device, memory_format=torch.channels_last) for t in tensors]
    absent = [None] * (MOST_TENSORS - len(tensors))
    most = max(t.numel() for t in tensors)
    config = cast_config(most, interpreter=interprets(device))
    launch(
        cast_kernel,
        (ceil_div(most, config.block_c), len(tensors)),
        touched=(*tensors, *outs),
        flops=0,
        config=config,
        device=device,
        **{f"x{i}_ptr": t for i, t in enumerate([*tensors, *absent])},
        **{f"out{i}_ptr": t for i, t in enumerate([*outs, *absent])},
        **{f"elements{i}": 0 if t is None else t.numel() for i, t in enumerate([*tensors, *absent])},
        COUNT=len(tensors),
        BLOCK=config.block_c,
    )
    return outs
