"""Triton's interpreter, made honest: what a GPU would refuse, round or leave undefined, it refuses, rounds or poisons.

The interpreter of Triton 3.6 and 3.8 computes bfloat16 on its bit patterns (garbage, without an error), reads outside
its arguments, fills masked lanes with zeros and runs the programs in order. ``install`` puts a stricter builder in its
place, for every kernel of the process:

- bfloat16 casts round to nearest even; its arithmetic, dots and selections run in float32 and round once; a 16-bit
  ``tl.sum`` rounds after every addition, as the adders of a GPU do;
- ``tl.dot`` on float32 rounds its operands to tf32 unless told otherwise, and refuses the sizes that compilers refuse;
- ``maximum``, ``minimum``, ``clamp`` and their reductions drop NaN;
- a masked lane without ``other`` reads NaN (integers: a wild number);
- every access must lie inside the argument its pointer came from; no element is written by two programs of a launch,
  and none that another program wrote is read; a descriptor's store must touch its tensor; float atomics are refused;
- int32 arithmetic that overflows is refused; hints (``multiple_of``, ``max_contiguous``) must be true;
  ``device_assert`` is on; a tensor of several elements has no truth value;
- programs run in a shuffled order, by seed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter

from .strict_builder import EnoughPrograms, Handle, Span, StrictBuilder, Violation, decode, encode, is_half

# ----- reductions -----


def _reduce(self: Any, inputs: tuple[Any, ...]) -> Any:
    """ReduceOps.apply_impl: NaN dropped by max and min, 16-bit sums rounded at every step, the rest as a tree."""
    standard, first = tl.standard, inputs[0]

    def along_axis(op: Any) -> Any:
        out = op(decode(first.handle), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(encode(out, first.dtype).data, first.dtype)

    if self.combine_fn is standard._elementwise_max:
        return along_axis(np.fmax.reduce)
    if self.combine_fn is standard._elementwise_min:
        return along_axis(np.fmin.reduce)
    if self.combine_fn is standard._sum_combine and not is_half(first.dtype):
        return along_axis(np.sum)

    axis = 0 if self.axis is None else self.axis
    rows = [t.handle.data.reshape(-1) if self.axis is None else np.moveaxis(t.handle.data, axis, 0) for t in inputs]
    dtypes = [t.dtype for t in inputs]
    while len(rows[0]) > 1:
        pairs = [_tensor(r[half::2], dtype) for half in (0, 1) for r, dtype in zip(rows, dtypes, strict=True)]
        out = self.combine_fn.fn(*pairs)
        rows = [t.handle.data for t in (out if isinstance(out, tuple) else (out,))]
    outs = []
    for row, dtype, source in zip(rows, dtypes, inputs, strict=True):
        data = row[0]
        if self.keep_dims:
            shape = source.handle.data.shape
            data = data.reshape([1] * len(shape)) if self.axis is None else np.expand_dims(data, axis)
        outs.append(self.to_tensor(data, dtype))
    return outs if len(outs) > 1 else outs[0]


def _tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(Handle(data, dtype.scalar), tl.block_type(dtype.scalar, list(data.shape)))


# ----- installation -----

_originals: dict[str, Any] = {}
_patched: set[int] | None = None


def _check_hint(self: Handle, key: str, values: list[int]) -> None:
    """``multiple_of`` and ``max_contiguous`` are promises; a broken one is a wrong vector load on a GPU."""
    data = self.data if self.data.ndim else self.data[None]
    for axis, value in enumerate(values):
        if key == "tt.divisibility" and (np.take(data, 0, axis=axis) % value).any():
            raise Violation(f"multiple_of({value}) does not hold")
        if key == "tt.contiguity" and value > 1:
            lanes = np.moveaxis(data, axis, -1).astype(np.int64)
            runs = lanes.reshape(*lanes.shape[:-1], -1, min(value, lanes.shape[-1]))
            step = max(1, self.dtype.scalar.element_ty.primitive_bitwidth // 8) if self.dtype.scalar.is_ptr() else 1
            if (np.diff(runs, axis=-1) != step).any():
                raise Violation(f"max_contiguous({value}) does not hold")
    self.attr[key] = values


def _convert_argument(arg: Any) -> Any:
    if isinstance(arg, bool):
        return tl.tensor(Handle(np.array([arg]), tl.int1), tl.int1)
    out = _originals["convert"](arg)
    if hasattr(arg, "data_ptr"):
        out.handle.attr["span"] = Span(interpreter._unwrap_tensor(arg))
    return out


def _run_grid(self: Any, *args: Any, **kwargs: Any) -> None:
    global _patched
    outer, _patched = _patched, set()
    try:
        with np.errstate(all="ignore"), suppress(EnoughPrograms):
            _originals["run"](self, *args, **kwargs)
    finally:
        _patched = outer


def _restore_arguments(self: Any, args: Any, args_host: Any, kwargs: Any, kwargs_host: Any) -> None:
    """Copies results back to a GPU; what lies on the CPU was written in place."""
    if any(isinstance(arg, torch.Tensor) and arg.device.type != "cpu" for arg in (*args, *kwargs.values())):
        _originals["restore"](self, args, args_host, kwargs, kwargs_host)


def _call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function: its language modules are patched once a launch, not at every call (a millisecond each)."""
    modules = {id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core}
    if _patched is None or not modules <= _patched:
        interpreter._patch_lang(self.fn)
        if _patched is not None:
            _patched.update(modules)
    return self.rewrite()(*args, **kwargs)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    def truth(self: Any) -> bool:
        if self.handle.data.size != 1:
            if sys._getframe(1).f_globals["__name__"].startswith("triton."):
                return True  # the language asks whether an optional tensor was given
            raise Violation("the truth value of a tensor of several elements")
        return bool(self.handle.data.item())

    _originals["tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
    scope.set_attr(tensor, "__bool__", truth)


def _descriptor_pointers(self: Any, offsets: Any) -> tuple[Handle, np.ndarray]:
    ptrs, masks = _originals["descriptor"](self, offsets)
    ptrs.attr["span"] = self.base.attr["span"]
    return ptrs, masks


_PATCHES: dict[str, tuple[Any, str, Any]] = {
    "reduce": (interpreter.ReduceOps, "apply_impl", _reduce),
    "hint": (interpreter.TensorHandle, "set_attr", _check_hint),
    "convert": (interpreter, "_implicit_cvt", _convert_argument),
    "run": (interpreter.GridExecutor, "__call__", _run_grid),
    "restore": (interpreter.GridExecutor, "_restore_args_dev", _restore_arguments),
    "helper": (interpreter.InterpretedFunction, "__call__", _call_helper),
    "tensor": (interpreter, "_patch_lang_tensor", _patch_tensor),
    "descriptor": (interpreter.TensorDescHandle, "materialize_pointers", _descriptor_pointers),
}


def install(seed: int = 0) -> None:
    """Makes the interpreter of this process strict. Installing again only takes the new seed."""
    builder = interpreter.interpreter_builder
    builder.rng = np.random.default_rng(seed)
    if _originals:
        return
    for key, (owner, name, replacement) in _PATCHES.items():
        _originals[key] = getattr(owner, name)
        setattr(owner, name, replacement)
    builder.__class__ = StrictBuilder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = min_dot_size(None)


@contextmanager
def sampling(programs: int) -> Iterator[None]:
    """Runs only so many programs from either end of each launch: for tensors too large to compute in full."""
    builder = interpreter.interpreter_builder
    builder.sample = programs
    try:
        yield
    finally:
        builder.sample = None


@contextmanager
def truncating() -> Iterator[None]:
    """Accumulators of 16-bit products are cut off instead of rounded: what tensor cores may do, and others do not."""
    builder = interpreter.interpreter_builder
    builder.truncates = True
    try:
        yield
    finally:
        builder.truncates = False
