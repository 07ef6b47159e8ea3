"""Registers as arrays of bits, and the numbers that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def size_of(kind: str) -> int:
    """Bits of a type such as s32, bf16x2, tf32 or pred."""
    if kind == "pred":
        return 1
    if kind.endswith("x2"):
        return 32
    return int(re.sub(r"\D", "", kind))


def is_float(kind: str) -> bool:
    return kind in FLOATS


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    """Round to nearest, ties to even; NaN as the hardware writes it."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def number(bits: Array, kind: str) -> Array:
    """What ``bits`` mean as ``kind``; 16-bit floats as float32. Wider registers are read by their low bits."""
    if kind == "pred":
        return bits
    size = size_of(kind)
    if bits.dtype.itemsize * 8 != size:
        bits = bits.astype(UNSIGNED[size])
    if kind == "bf16":
        return bf16_to_f32(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind[0] == "f":
        return bits.view({32: np.float32, 64: np.float64}[size])
    return bits.view(SIGNED[size]) if kind[0] == "s" else bits


def bits_of(value: Array, kind: str) -> Array:
    """The register that holds ``value`` as ``kind``."""
    if kind == "pred":
        return value.astype(bool)
    size = size_of(kind)
    if kind == "bf16":
        return f32_to_bf16(value)
    if kind == "f16":
        return np.asarray(value).astype(np.float16).view(np.uint16)
    if kind[0] == "f":
        return np.asarray(value).astype({32: np.float32, 64: np.float64}[size]).view(UNSIGNED[size])
    return np.asarray(value).astype(SIGNED[size] if kind[0] == "s" else UNSIGNED[size]).view(UNSIGNED[size])


def fit(bits: Array, size: int, signed: bool = False) -> Array:
    """``bits`` in a register of ``size``: extended by the sign where they are signed, by zeros otherwise."""
    if size == 1 or bits.dtype == bool:
        return bits
    held = bits.dtype.itemsize * 8
    if held == size:
        return bits
    return (
        (bits.view(SIGNED[held]) if signed else bits)
        .astype(SIGNED[size] if signed else UNSIGNED[size])
        .view(UNSIGNED[size])
    )


def halves(bits: Array) -> tuple[Array, Array]:
    """The low and the high 16 bits of 32."""
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def joined(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def literal(text: str, size: int) -> Any:
    """An immediate operand: 42, -1, 0xff, 0f3F800000 or 0d3FF0000000000000."""
    if size == 1:
        return np.bool_(int(text, 0) != 0)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        value = int(text[2:], 16)
    else:
        value = int(text.rstrip("U"), 0)
    return UNSIGNED[size](value & ((1 << size) - 1))


def paired(function: Callable[..., Array]) -> Callable[..., Array]:
    """``function`` of 16-bit registers, on both halves of 32-bit ones."""

    def both(*operands: Array) -> Array:
        low, high = zip(*(halves(operand) for operand in operands), strict=True)
        return joined(function(*low), function(*high))

    return both
