"""The strict interpreter's builder: values, memory and arithmetic. ``strict_interpreter`` says what it is for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
WILD_INTEGER = {1: 90, 2: 23130}  # by bytes; wider ones: far outside any tensor of a test, far from overflowing
_WIDE_WILD_INTEGER = -(2**20) - 7


class Violation(RuntimeError):
    """A kernel did something that a GPU would leave undefined, or that is a race."""


class EnoughPrograms(BaseException):
    """Ends a launch of which only a sample runs; no error, so no ``except Exception`` sees it."""


class Span:
    """The memory of one tensor argument: what a pointer made from it may touch."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        self.start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.nbytes = 0 if tensor.numel() == 0 else (last + 1) * tensor.element_size()
        self._views: dict[np.dtype, np.ndarray] = {}
        self._keep = tensor  # the address stays valid as long as a pointer knows it

    def view(self, dtype: np.dtype) -> np.ndarray:
        if dtype not in self._views:
            buffer = (ctypes.c_char * self.nbytes).from_address(self.start)
            self._views[dtype] = np.frombuffer(buffer, dtype=dtype)
        return self._views[dtype]


# ----- values: bfloat16 is kept as bit patterns, and computed on as float32 -----


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values)).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def float32_to_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest float32 with ten mantissa bits, ties away from zero (``cvt.rna.tf32``)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def decode(handle: Handle) -> np.ndarray:
    """The values behind a handle, bfloat16 as float32."""
    return bfloat16_to_float32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def encode(values: Any, dtype: tl.dtype) -> Handle:
    """A handle of ``dtype`` for ``values``, rounded to nearest even; comparisons become int1."""
    dtype = dtype.scalar
    values = np.asarray(values)
    if values.dtype == np.bool_:
        return Handle(values, tl.int1)
    if dtype == tl.bfloat16:
        return Handle(float32_to_bfloat16(values.astype(np.float32)), dtype)
    return Handle(values.astype(interpreter._get_np_dtype(dtype), copy=False), dtype)


def is_half(dtype: tl.dtype) -> bool:
    return dtype.scalar in (tl.float16, tl.bfloat16)


# ----- the builder -----


def _carrying(name: str) -> Callable[..., Handle]:
    """The method of the original builder, keeping the argument that a pointer came from."""
    original = getattr(interpreter.InterpreterBuilder, name)
    position = 1 if name == "create_splat" else 0

    def method(self: StrictBuilder, *args: Any) -> Handle:
        out = original(self, *args)
        if "span" in args[position].attr:
            out.attr["span"] = args[position].attr["span"]
        return out

    return method


def _checked(op: np.ufunc) -> Callable[..., Handle]:
    """Integer arithmetic that refuses to overflow int32 (offsets must be widened first)."""

    def method(self: StrictBuilder, lhs: Handle, rhs: Handle) -> Handle:
        if lhs.data.dtype != np.int32 or rhs.data.dtype != np.int32:
            return self.binary_op(lhs, rhs, op)
        wide = op(lhs.data, rhs.data, dtype=np.int64)
        narrow = wide.astype(np.int32)
        if not np.array_equal(wide, narrow):
            raise Violation(f"int32 {op.__name__} overflows: {wide.flat[np.argmax(np.abs(wide))]}")
        return Handle(narrow, lhs.dtype.scalar)

    return method


class StrictBuilder(interpreter.InterpreterBuilder):
    """Takes the place of the interpreter's builder by changing the class of that object."""

    rng: np.random.Generator
    order: np.ndarray
    sample: int | None = None
    """Run only so many programs from either end of a launch."""
    truncates = False
    """Products of 16-bit operands cut off their sums."""
    writers: dict[tuple[int, int], np.ndarray]
    program: int

    create_add = _checked(np.add)
    create_sub = _checked(np.subtract)
    create_mul = _checked(np.multiply)

    create_addptr = _carrying("create_addptr")
    create_broadcast = _carrying("create_broadcast")
    create_splat = _carrying("create_splat")
    create_unsplat = _carrying("create_unsplat")
    create_expand_dims = _carrying("create_expand_dims")
    create_reshape = _carrying("create_reshape")
    create_trans = _carrying("create_trans")
    create_bitcast = _carrying("create_bitcast")

    def get_bf16(self, value: float) -> Handle:
        return encode(np.array([value], dtype=np.float32), tl.bfloat16)

    # order of programs

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        total = nx * ny * nz
        if self.sample is None or total <= 2 * self.sample:
            self.order = self.rng.permutation(total)
        else:
            self.order = self.rng.permutation([*range(self.sample), *range(total - self.sample, total)])
        self.writers = {}

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        position = (x * ny + y) * nz + z
        if position == len(self.order):
            raise EnoughPrograms
        self.program = int(self.order[position])
        super().set_grid_idx(self.program // (ny * nz), self.program // nz % ny, self.program % nz)

    # memory

    def _locate(self, ptrs: Handle, mask: Handle | np.ndarray | None, what: str) -> tuple[Span, Any, Any, np.ndarray]:
        """The argument behind ``ptrs``, its memory, the element indices and the mask."""
        span = ptrs.attr.get("span")
        if span is None:
            raise Violation(f"{what} through a pointer that comes from no argument")
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        size = span.nbytes // dtype.itemsize
        index = (ptrs.data - np.uint64(span.start)).view(np.int64) >> (dtype.itemsize.bit_length() - 1)
        outside = index.view(np.uint64) >= size  # unsigned: an index before the start is a huge one
        active = np.True_ if mask is None else mask.data if isinstance(mask, Handle) else mask
        outside &= active
        if outside.any():
            first = int(index[outside][0])
            raise Violation(f"{what} outside of an argument {span.name}: element {first} of {size} in {self.grid_idx}")
        return span, span.view(dtype), index, active

    def _writers(self, span: Span, memory: np.ndarray) -> np.ndarray:
        """By element: the number of the program that wrote it, plus one. Zeros take no memory until then."""
        key = (span.start, memory.itemsize)
        if key not in self.writers:
            self.writers[key] = np.zeros(memory.size, dtype=np.int32)
        return self.writers[key]

    def create_load(self, ptr: Handle, *rest: Any) -> Handle:
        return self.create_masked_load(ptr, None, None, *rest)

    def create_masked_load(self, ptrs: Handle, mask: Any, other: Any, *rest: Any, **named: Any) -> Handle:
        span, memory, index, active = self._locate(ptrs, mask, "load")
        dtype = ptrs.get_element_ty()
        written = self.writers.get((span.start, memory.itemsize))
        if written is not None and memory.size:
            writer = written.take(index, mode="clip")
            if (((writer > 0) & (writer != self.program + 1)) & active).any():
                raise Violation(f"load from {span.name} of what another program wrote: a race")
        if active.all() and memory.size:
            return Handle(memory.take(index, mode="clip"), dtype)
        if other is not None:
            data = np.array(np.broadcast_to(other.data, index.shape))
        elif dtype.is_floating():
            data = encode(np.full(index.shape, np.nan), dtype).data
        else:
            wild = WILD_INTEGER.get(memory.itemsize, _WIDE_WILD_INTEGER)
            data = np.full(index.shape, wild).astype(memory.dtype)
        if memory.size:
            np.copyto(data, memory.take(index, mode="clip"), where=active)
        return Handle(data, dtype)

    def create_store(self, ptr: Handle, val: Handle, *rest: Any) -> None:
        self.create_masked_store(ptr, val, None)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Any, *rest: Any) -> None:
        span, memory, index, active = self._locate(ptrs, mask, "store")
        data = np.broadcast_to(value.data, index.shape)
        if not active.all():
            active = np.broadcast_to(active, index.shape)
            index, data = index[active], data[active]
        if index.size == 0:
            return
        written = self._writers(span, memory)
        writer = written[index]
        if ((writer > 0) & (writer != self.program + 1)).any():
            raise Violation(f"store to {span.name} of what another program wrote: a race")
        written[index] = self.program + 1
        memory[index] = data

    def create_descriptor_store(self, desc: Any, value: Handle, indices: list[Handle]) -> None:
        if not desc.materialize_pointers(indices)[1].any():
            raise Violation("a store to a box that lies wholly outside of its tensor: hardware traps")
        super().create_descriptor_store(desc, value, indices)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Handle, *rest: Any) -> Handle:
        if val.dtype.scalar.is_floating():
            raise Violation("atomics on floats depend on the order of programs")
        self._locate(ptr, mask, "atomic")
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: Handle, cmp: Handle, val: Handle, *rest: Any) -> Handle:
        self._locate(ptr, None, "atomic")
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    # arithmetic

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        values = decode(src)
        if dst_type.scalar == tl.int1:
            return Handle(values != 0, tl.int1)
        # a boolean is a number here, not the result of a comparison
        return encode(values.astype(np.uint8) if values.dtype == np.bool_ else values, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding_mode: Any) -> Handle:
        wide = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
        nearest = rounding_mode is None or rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and src.dtype.scalar in wide and dst_type.scalar in wide:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        op = {np.maximum: np.fmax, np.minimum: np.fmin}.get(op, op)
        return encode(op(decode(lhs), decode(rhs)), lhs.dtype)

    # PropagateNan.ALL asks for it by name
    def create_maximumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return encode(np.maximum(decode(lhs), decode(rhs)), lhs.dtype)

    def create_minimumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return encode(np.minimum(decode(lhs), decode(rhs)), lhs.dtype)

    def unary_op(self, arg: Handle, op: Any) -> Handle:
        return encode(op(decode(arg)), arg.dtype)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
        if propagate_nans == interpreter._ir.PROPAGATE_NAN.NONE:
            return encode(np.fmin(np.fmax(decode(arg), decode(lo)), decode(hi)), arg.dtype)
        return encode(np.clip(decode(arg), decode(lo), decode(hi)), arg.dtype)

    def create_select(self, cond: Handle, lhs: Handle, rhs: Handle) -> Handle:
        out = Handle(np.where(cond.data, lhs.data, rhs.data), rhs.dtype.scalar)
        span = lhs.attr.get("span")
        if span is not None and span is rhs.attr.get("span"):
            out.attr["span"] = span
        return out

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        """One rounding: the product of two float32 is exact in float64."""
        return encode(decode(x).astype(np.float64) * decode(y) + decode(z), z.dtype)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return encode(1 / np.sqrt(decode(arg)), arg.dtype)

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: Any) -> Handle:
        if a.dtype.primitive_bitwidth == 8:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        left, right = decode(a), decode(b)
        if self.truncates and is_half(a.dtype):
            return encode(_truncated_dot(left, right, decode(d)), d.dtype)
        accumulate = np.float64 if left.dtype == np.float64 else np.float32
        if a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            left, right = float32_to_tf32(left), float32_to_tf32(right)
        return encode(np.matmul(left, right, dtype=accumulate) + decode(d), d.dtype)


def _truncated_dot(left: np.ndarray, right: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + left right in steps of 16, the sum of each cut off (not rounded) to float32, as a tensor core may."""
    for k in range(0, left.shape[-1], 16):
        step = np.matmul(left[..., k : k + 16], right[..., k : k + 16, :], dtype=np.float64) + acc
        acc = step.astype(np.float32)
        acc = np.where(np.abs(acc) > np.abs(step), np.nextafter(acc, np.float32(0)), acc)
    return acc
