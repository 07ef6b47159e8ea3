"""Arithmetic, comparisons and conversions: what an instruction makes of its sources, thread by thread."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .bits import UNSIGNED, Array, bits_of, fit, is_float, joined, number, paired, size_of

Operation = Callable[..., Array]


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once: the product is exact in the wider format."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + np.asarray(c).astype(wide)).astype(a.dtype)


def _shifted(a: Array, count: Array, left: bool) -> Array:
    """Counts at and beyond the width leave nothing, or the sign."""
    size = a.dtype.itemsize * 8
    most = np.minimum(count.astype(np.uint32), np.uint32(size)).astype(np.int64)
    inside = np.minimum(most, size - 1).astype(a.dtype)
    if left:
        return np.where(most >= size, a.dtype.type(0), a << inside)
    beyond = (a >> a.dtype.type(size - 1)) if np.issubdtype(a.dtype, np.signedinteger) else a.dtype.type(0)
    return np.where(most >= size, beyond, a >> inside)


def _truncated(a: Array, b: Array) -> Array:
    """Division towards zero; by zero, all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if np.issubdtype(a.dtype, np.signedinteger):
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient).astype(a.dtype)


def _extracted(a: Array, start: Array, length: Array) -> Array:
    """bfe: a field of bits, moved down; signed ones are extended by their own highest bit."""
    size = a.dtype.itemsize * 8
    wide = a.astype(np.int64) if np.issubdtype(a.dtype, np.signedinteger) else a.astype(np.uint64).astype(np.int64)
    start = np.minimum(start.astype(np.int64) & 255, size - 1)
    length = np.minimum(length.astype(np.int64) & 255, size - start)
    field = (wide >> start) & ((np.int64(1) << length) - 1)
    if np.issubdtype(a.dtype, np.signedinteger):
        sign = (field >> np.maximum(length - 1, 0)) & 1
        field = np.where((length > 0) & (sign == 1), field - (np.int64(1) << length), field)
    return field.astype(a.dtype)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes out of eight; bit 3 of a selector spreads the byte's sign."""
    whole = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for byte in range(4):
        code = (selector.astype(np.uint32) >> np.uint32(4 * byte)) & np.uint32(15)
        picked = (whole >> (np.uint64(8) * (code & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        spread = np.where(picked & np.uint64(128), np.uint64(255), np.uint64(0))
        picked = np.where(code & np.uint32(8), spread, picked)
        result = result | (picked.astype(np.uint32) << np.uint32(8 * byte))
    return result


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product of at most 32 bits each."""
    size = a.dtype.itemsize * 8
    if size == 64:
        both = np.asarray(a).astype(object) * np.asarray(b).astype(object)
        return np.asarray(both >> 64).astype(a.dtype)
    wide = np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(size)).astype(a.dtype)


def _smaller(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if np.issubdtype(a.dtype, np.floating) else np.minimum(a, b)


def _larger(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if np.issubdtype(a.dtype, np.floating) else np.maximum(a, b)


def _bits_set(a: Array) -> Array:
    spread = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, -1), axis=-1)
    return spread.sum(-1).astype(np.uint32)


PLAIN: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "fma": _fma,
    "mad": lambda a, b, c: a * b + c,
    "min": _smaller,
    "max": _larger,
    "neg": lambda a: (-a) if np.issubdtype(a.dtype, np.floating) else (a.dtype.type(0) - a),
    "abs": np.abs,
    "sqrt": np.sqrt,
    "copysign": lambda sign, size: np.copysign(size, sign),
    "bfe": _extracted,
    "prmt": _permuted,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "popc": _bits_set,
}
"""By the first part of the opcode: functions of numbers of the instruction's type."""

COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


def compare(name: str, kind: str) -> Operation:
    """A predicate of two registers. Ordered comparisons are false of NaN; "neu" and its like are true."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(number(a, kind)) | np.isnan(number(b, kind))) == (name == "nan")
    unordered = is_float(kind) and len(name) == 3 and name.endswith("u")
    test = COMPARISONS[name[:2]]

    def compared(a: Array, b: Array) -> Array:
        x, y = number(a, kind), number(b, kind)
        found = test(x, y)
        if not is_float(kind):
            return np.asarray(found)
        missing = np.isnan(x) | np.isnan(y)
        return (found | missing) if unordered else (found & ~missing)

    return compared


def convert(target: str, source: str, modifiers: frozenset[str]) -> Operation:
    """``cvt`` of one register. Integers wrap, floats round to nearest; ``rzi`` and its like make integers of them."""

    def converted(a: Array) -> Array:
        value = number(a, source)
        if target == "tf32":
            return _tf32(value)
        if is_float(source) and not is_float(target):
            whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
            rounded = next(function for name, function in whole.items() if name in modifiers)(value)
            bounds = np.iinfo(UNSIGNED[size_of(target)] if target[0] == "u" else f"int{size_of(target)}")
            value = np.clip(np.nan_to_num(rounded.astype(np.float64)), bounds.min, bounds.max)
            return bits_of(value, target)
        if is_float(target) or is_float(source):
            return bits_of(value, target)
        return fit(bits_of(value, source), size_of(target), signed=source[0] == "s")

    return converted


def _tf32(value: Array) -> Array:
    """Ten bits of mantissa, ties away from zero (``rna``)."""
    return (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def operation(opcode: tuple[str, ...]) -> Operation | None:
    """What an arithmetic opcode computes of registers, or None of one that no kernel was seen to use."""
    name, kind, modifiers = opcode[0], opcode[-1], frozenset(opcode[1:-1])
    if kind.endswith("x2"):
        half = operation((*opcode[:-1], kind.removesuffix("x2")))
        return None if half is None else paired(half)
    if name == "cvt" and opcode[-2].endswith("x2"):
        half = convert(opcode[-2].removesuffix("x2"), opcode[-1], modifiers)
        return lambda high, low: joined(half(low), half(high))
    if name == "cvt":
        return convert(opcode[-2], opcode[-1], modifiers)
    if name in ("shl", "shr"):
        return lambda a, count: _of(lambda x: _shifted(x, count, name == "shl"), kind, a)
    if name == "selp":
        return lambda a, b, chosen: np.where(chosen, a, b)
    if "wide" in modifiers:
        return _widened(kind)
    if "hi" in modifiers and name in ("mul", "mad"):
        return lambda a, b, *c: bits_of(
            _high(number(a, kind), number(b, kind)) + (number(c[0], kind) if c else 0), kind
        )
    if name == "div":
        divide = operator.truediv if is_float(kind) else _truncated
        return lambda a, b: bits_of(divide(number(a, kind), number(b, kind)), kind)
    if name == "rem":
        return lambda a, b: bits_of(_remainder(number(a, kind), number(b, kind)), kind)
    if name in ("bfe", "prmt"):
        return lambda a, *rest: bits_of(PLAIN[name](number(a, kind), *rest), kind)
    if name in ("min", "max") and "NaN" in modifiers:
        lasting = np.minimum if name == "min" else np.maximum
        return lambda a, b: bits_of(lasting(number(a, kind), number(b, kind)), kind)
    if name in PLAIN:
        return lambda *operands: bits_of(PLAIN[name](*(number(a, kind) for a in operands)), kind)
    return None


def _widened(kind: str) -> Operation:
    """mul.wide and mad.wide: factors of ``kind``, a product (and what is added) of twice its size."""
    twice, signed = f"{kind[0]}{2 * size_of(kind)}", kind[0] == "s"

    def widened(a: Array, b: Array, *c: Array) -> Array:
        left, right = (number(fit(factor, size_of(twice), signed), twice) for factor in (a, b))
        return bits_of(left * right + (number(c[0], twice) if c else 0), twice)

    return widened


def _remainder(a: Array, b: Array) -> Array:
    return a - _truncated(a, b) * b


def _of(function: Callable[[Array], Array], kind: str, a: Array) -> Array:
    return bits_of(function(number(a, kind)), kind)
