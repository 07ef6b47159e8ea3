"""Tiles of the bandwidth-bound passes, as functions of the size alone: the same on every rank and in every run.

A program takes ``block_m`` rows by ``block_c`` channels, a step of a few rows at a time (:func:`step`), in 16-byte
loads. ``interpreter`` asks for few, large programs: their number is what time depends on there.

These rules are the passes' cost model: memory takes what it takes, and what a tile decides is how well it is kept busy.
Where several tiles were measured on an H100 (``python -m benchmarks.fit`` prints them) they lose a hundredth to the
fastest: a reduction is fastest in one wave of as many programs as its registers let run at once, since each ends in
sums across its warps; a merge in few steps. Nothing but their defaults was measured of :func:`pass_config`,
:func:`window_config`, :func:`cast_config` and :func:`transpose_config`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

from .config import PassConfig

CUMULATIVE: Final = math.inf
"""In place of a momentum: running statistics are the average over the batches that a counter has counted."""

VECTOR_BYTES = 16
WARP = 32
FEW_TILES = 2048
"""So many are merged by one kernel."""
MERGED_TILES = 128
"""At most so many are left of more. Both, and the warps, as measured (records/h100-2026-11-23-statistics)."""
STEP_TILES, MERGE_WARPS = 1024, 4
INTERPRETER_WARPS = 128  # sizes the steps there, nothing else
INTERPRETER_ELEMENTS = 1 << 20


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=4096)
def step(config: PassConfig, itemsize: int, vectors: int) -> tuple[int, int]:
    """(row groups, rows of a group) of one step: a thread has a vector in each of at most ``vectors`` groups."""
    elements = config.num_warps * WARP * max(VECTOR_BYTES // itemsize, 1)
    rows = next_power_of_2(config.block_m)
    group = max(1, min(elements // config.block_c, rows))
    return min(vectors, rows // group), group


@lru_cache(maxsize=4096)
def pass_config(
    rows: int, channels: int, itemsize: int, sm_count: int = 132, *, interpreter: bool = False
) -> PassConfig:
    """An elementwise pass: enough programs for several waves, each long enough to reuse its per-channel rows."""
    return _config(rows, channels, itemsize, 32 * sm_count, block_c=256, max_steps=8, interpreter=interpreter)


@lru_cache(maxsize=4096)
def reduce_config(
    rows: int, channels: int, itemsize: int, sm_count: int = 132, *, tensors: int = 1, interpreter: bool = False
) -> PassConfig:
    """A pass that reduces over rows: one wave of programs, in all channel blocks together.

    Eight of them share a processor. Where three ``tensors`` or more of this size are read or written four do, whose
    registers leave no room for more; of four tensors a program takes longer stretches.
    """
    programs = (8 if tensors < 3 else 4) * sm_count
    block_c = 64 if tensors < 4 else 128
    return _config(rows, channels, itemsize, programs, block_c=block_c, max_steps=64, interpreter=interpreter)


def _config(
    rows: int, channels: int, itemsize: int, programs: int, *, block_c: int, max_steps: int, interpreter: bool
) -> PassConfig:
    if interpreter:
        block_c = min(max(next_power_of_2(channels), 8), 512)
        block_m = min(next_power_of_2(rows), INTERPRETER_ELEMENTS // block_c)
        return PassConfig(block_m, block_c, num_warps=INTERPRETER_WARPS)
    block_c = min(max(next_power_of_2(channels), 8), block_c)  # a mask's byte holds eight channels
    groups, group = step(PassConfig(rows, block_c), itemsize, vectors=4)
    step_rows = groups * group
    tiles = max(programs // ceil_div(channels, block_c), 1)
    steps = min(max(ceil_div(rows, step_rows * tiles), 1), max_steps)
    return PassConfig(block_m=step_rows * steps, block_c=block_c)


@lru_cache(maxsize=4096)
def cast_config(elements: int, *, interpreter: bool = False) -> PassConfig:
    """A copy of a flat tensor, of at most ``elements``: two vectors a thread, so that small ones still spread."""
    return PassConfig(block_m=1, block_c=min(next_power_of_2(elements), INTERPRETER_ELEMENTS) if interpreter else 1024)


def frozen_grad_config(channels: int, length: int, *, interpreter: bool = False) -> PassConfig:
    """A pass over the rows of a weight [channels, length]: as many programs as steps of two vectors a thread make."""
    block_c = min(next_power_of_2(length), 1024)
    block_m = min(next_power_of_2(channels), 64) if interpreter else max(1, 1024 // block_c)
    return PassConfig(block_m=block_m, block_c=block_c)


@lru_cache(maxsize=4096)
def group_config(tiles: int, channels: int, *, interpreter: bool = False) -> PassConfig | None:
    """A merge of every ``block_m`` neighbours among [T, C] tiles, so that few are left; ``None`` where few are.

    Hundreds of programs read a few steps each; the few of :func:`merge_config` would take one step after another.
    """
    if tiles <= FEW_TILES:
        return None
    block_t = next_power_of_2(ceil_div(tiles, MERGED_TILES))
    block_c = min(next_power_of_2(channels), 512 if interpreter else 64)
    return PassConfig(
        block_m=block_t, block_c=block_c, num_warps=max(1, min(block_t * block_c // (16 * WARP), MERGE_WARPS))
    )


@lru_cache(maxsize=4096)
def transpose_config(pixels: int, channels: int, *, interpreter: bool = False) -> PassConfig:
    """A transposition by tiles: two cache lines of 16-bit values both ways, where the sizes give so many."""
    block_m, block_c = next_power_of_2(pixels), next_power_of_2(channels)
    if interpreter:
        return PassConfig(min(block_m, 1024), min(block_c, 512), num_warps=INTERPRETER_WARPS)
    return PassConfig(min(block_m, 64), min(block_c, 64))


@lru_cache(maxsize=4096)
def merge_config(tiles: int, channels: int, *, interpreter: bool = False) -> PassConfig:
    """The merge of [T, C] tiles: ``block_m`` tiles at a time, eight channels (one sector of memory) per program."""
    block_c = min(next_power_of_2(channels), 512 if interpreter else 8)
    block_t = min(next_power_of_2(tiles), STEP_TILES)
    num_warps = max(1, min(block_t * block_c // (8 * WARP), MERGE_WARPS))
    return PassConfig(block_m=block_t, block_c=block_c, num_warps=num_warps)


@lru_cache(maxsize=4096)
def window_config(channels: int, *, interpreter: bool = False) -> PassConfig:
    """A pass over pooling windows: ``block_m`` of them at once, a power of two, their nine pixels in registers."""
    if interpreter:
        return PassConfig(block_m=4096, block_c=min(next_power_of_2(channels), 512), num_warps=INTERPRETER_WARPS)
    return PassConfig(block_m=16, block_c=min(next_power_of_2(channels), 64))
