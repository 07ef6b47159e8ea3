"""Matrices that the threads of a warp, or of a group of four, hold together: their moves and their products."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bits import Array, bf16_to_f32, halves, joined

LANE = np.arange(32)


def product(acc: Array, a: Array, b: Array) -> Array:
    """acc + a @ b in float32 as tensor cores have it: products are exact, and the sum's last bits are cut off."""
    exact = acc.astype(np.float64) + np.matmul(a.astype(np.float64), b.astype(np.float64))
    near = exact.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(exact)
    return np.where(beyond & np.isfinite(near), np.nextafter(near, np.float32(0)), near)


def numbers(bits: Array, kind: str) -> Array:
    """Operands as float32: 16-bit ones from 16 bits each, tf32 from 32 of which the last thirteen are not looked at."""
    if kind == "bf16":
        return bf16_to_f32(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def unpacked(registers: list[Array], kind: str) -> list[Array]:
    """Each register's elements, in the order of memory."""
    if kind == "tf32":
        return [numbers(register, kind) for register in registers]
    return [numbers(half, kind) for register in registers for half in halves(register)]


def left(registers: list[Array], kind: str) -> Array:
    """[..., 16, k] from four registers [..., 32] of a warp's threads."""
    values = np.stack(unpacked(registers, kind), -1)
    wide = 2 if kind != "tf32" else 1
    out = np.empty((*values.shape[:-2], 16, 8 * wide), np.float32)
    for register in range(4):
        for e in range(wide):
            rows = LANE // 4 + 8 * (register % 2)
            columns = wide * (LANE % 4) + 4 * wide * (register // 2) + e
            out[..., rows, columns] = values[..., wide * register + e]
    return out


def right(registers: list[Array], kind: str) -> Array:
    """[..., k, 8] from two registers [..., 32] of a warp's threads."""
    values = np.stack(unpacked(registers, kind), -1)
    wide = 2 if kind != "tf32" else 1
    out = np.empty((*values.shape[:-2], 8 * wide, 8), np.float32)
    for register in range(2):
        for e in range(wide):
            rows = wide * (LANE % 4) + 4 * wide * register + e
            out[..., rows, LANE // 4] = values[..., wide * register + e]
    return out


def _places(registers: int) -> tuple[Array, Array]:
    """Row (of 16) and column of each accumulator, [registers, 32]."""
    i = np.arange(registers)[:, None]
    return LANE // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANE % 4) + i % 2


def accumulators(registers: list[Array]) -> Array:
    """[..., 16, n] from n / 2 registers [..., 32]."""
    rows, columns = _places(len(registers))
    out = np.empty((*registers[0].shape[:-1], 16, 2 * len(registers)), np.float32)
    for i, register in enumerate(registers):
        out[..., rows[i], columns[i]] = register.view(np.float32)
    return out


def to_registers(tile: Array) -> list[Array]:
    """The way back from [..., 16, n]."""
    rows, columns = _places(tile.shape[-1] // 2)
    return [np.ascontiguousarray(tile[..., r, c]).view(np.uint32) for r, c in zip(rows, columns, strict=True)]


def small_product(a: Array, b: Array, c: list[Array]) -> list[Array]:
    """m8n8k4 in float64: a register [..., 32] of each operand, two of the accumulator."""
    left, right = np.empty((*a.shape[:-1], 8, 4)), np.empty((*b.shape[:-1], 4, 8))
    left[..., LANE // 4, LANE % 4], right[..., LANE % 4, LANE // 4] = a.view(np.float64), b.view(np.float64)
    found = np.matmul(left, right)
    return [
        (register.view(np.float64) + found[..., LANE // 4, 2 * (LANE % 4) + i]).view(np.uint64)
        for i, register in enumerate(c)
    ]


# ---------------------------------------------------------------- shared memory


def load_matrices(rows: Array, transposed: bool) -> Array:
    """[..., 32] registers from 8 rows [..., 8, 8] of 16 bits."""
    tile = np.swapaxes(rows, -1, -2) if transposed else rows
    row, column = LANE // 4, 2 * (LANE % 4)
    return joined(tile[..., row, column], tile[..., row, column + 1])


def store_matrices(register: Array, transposed: bool) -> Array:
    """8 rows [..., 8, 8] of 16 bits from [..., 32] registers."""
    low, high = halves(register)
    tile = np.empty((*register.shape[:-1], 8, 8), np.uint16)
    row, column = LANE // 4, 2 * (LANE % 4)
    tile[..., row, column], tile[..., row, column + 1] = low, high
    return np.swapaxes(tile, -1, -2) if transposed else tile


SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a descriptor's pattern by its mode."""


def swizzled(addresses: Array, pattern: int) -> Array:
    """Where a byte of shared memory really is: sixteen-byte units change places within ``pattern`` bytes."""
    return addresses ^ (((addresses >> 7) & (pattern // 16 - 1)) << 4)


def described(descriptor: int, rows: int, depth: int, itemsize: int, contiguous_rows: bool) -> Array:
    """Addresses [rows, depth] of a matrix that a descriptor of wgmma names.

    ``contiguous_rows``: neighbours in memory are rows (M or N), not steps of the reduction.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    pattern = SWIZZLES[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset")
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    unit = 16 // itemsize
    if pattern == 16:
        if contiguous_rows:
            offset = row // unit * stride + k // 8 * leading + k % 8 * 16 + row % unit * itemsize
        else:
            offset = row // 8 * stride + row % 8 * 16 + k // unit * leading + k % unit * itemsize
    elif contiguous_rows:
        chunk = pattern // itemsize
        offset = row // chunk * leading + k // 8 * stride + k % 8 * pattern + row % chunk * itemsize
    else:
        offset = row // 8 * stride + row % 8 * pattern + k * itemsize
    return swizzled(start + offset, pattern)


def gathered(raw: Array, addresses: Array, itemsize: int) -> Any:
    """Elements of ``itemsize`` bytes at byte addresses that are multiples of it."""
    return raw.view({2: np.uint16, 4: np.uint32}[itemsize])[addresses // itemsize]
