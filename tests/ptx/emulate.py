"""Stands in for the GPU: what is launched inside is compiled for one, and its PTX runs here."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_resnet.compile_worker import become_compiler

from .bulk import TensorMap
from .machine import Machine
from .matrices import SWIZZLES
from .memory import Global
from .parse import Kernel, parse

LANES = 4096
"""Threads that go in step."""


@functools.lru_cache(maxsize=64)
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


def _flat(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that the compiled kernel takes, with their types."""
    if isinstance(signature, tuple | list):
        for kind, part in zip(signature, value, strict=True):
            yield from _flat(kind, part)
    elif signature != "constexpr":
        yield signature, value


def _bits(kind: str, value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind in ("fp32", "f32"):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if kind in ("fp64", "f64"):
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return int(value)


def _map(described: TensorDescriptor, metadata: dict[str, Any]) -> TensorMap:
    return TensorMap(
        described.base.data_ptr(),
        tuple(described.shape),
        tuple(described.strides),
        tuple(metadata["block_size"]),
        described.base.element_size(),
        SWIZZLES[{0: 0, 1: 3, 2: 2, 3: 1}[metadata["swizzle"]]],
    )


def execute(compiled: Any, arguments: Iterable[Any], grid: tuple[int, ...], only: Sequence[int] | None = None) -> None:
    """Runs a compiled kernel over ``grid``; ``arguments`` in the order of its source, constants too.

    ``only``: the programs that run, by their numbers.
    """
    kernel = _parsed(compiled.asm["ptx"])
    described = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    values: list[int] = []
    tensors, maps = [], []
    for kind, value in _flat(tuple(compiled.src.signature.values()), tuple(arguments)):
        if isinstance(value, TensorDescriptor):
            maps.append(_map(value, next(described)))
            tensors.append(value.base)
            values += [len(maps) - 1, *value.shape, *value.strides]
            continue
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        values.append(_bits(kind, value))
    names = kernel.parameters
    if not len(values) <= len(names) <= len(values) + 2:  # and what Triton adds of its own
        raise RuntimeError(f"{kernel.name} takes {len(names)} parameters, got {len(values)} arguments")
    values += [0] * (len(names) - len(values))
    parameters = {
        name: value & ((1 << 8 * min(size, 8)) - 1) for (name, size), value in zip(names, values, strict=True)
    }
    whole = (*grid, 1, 1)[:3]
    programs = np.stack([axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, whole), indexing="ij")], -1)
    programs = programs if only is None else programs[list(only)]
    memory, at_once = Global(tensors), max(1, LANES // kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(programs), at_once):
            some = programs[first : first + at_once]
            Machine(kernel, parameters, memory, some, whole, compiled.metadata.shared, maps).run()


@contextmanager
def emulated(capability: int) -> Iterator[None]:
    """Every launch of a Triton kernel inside runs the PTX that is compiled for ``capability``, on CPU tensors."""
    driver, run, take = triton.runtime.driver, JITFunction.run, CompiledKernel.__getitem__
    before = driver._active
    become_compiler(capability)

    def runs(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            execute(compiled, [given.get(p.name, p.default) for p in self.params], grid)
        return compiled

    def takes(self: Any, grid: tuple[int, ...]) -> Any:
        return lambda *values: execute(self, values, grid)

    JITFunction.run, CompiledKernel.__getitem__ = runs, takes
    try:
        yield
    finally:
        JITFunction.run, CompiledKernel.__getitem__ = run, take
        driver._active = before
