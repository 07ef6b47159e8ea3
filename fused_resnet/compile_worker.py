"""Compiles kernels without running them, in a process of its own: ``python -m fused_resnet.compile_worker``.

Reads a pickled (compute capability, jobs) from its standard input, leaves the results in Triton's cache on disk, where
every process finds them, and writes a JSON list of what failed. Needs no GPU: Triton is told what the target is.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from typing import Any, NamedTuple

import torch
import triton


class TensorArgument(NamedTuple):
    """As much of a tensor as compilation asks for."""

    dtype: torch.dtype
    aligned: bool
    """To 16 bytes."""

    def build(self) -> torch.Tensor:
        return torch.empty(2, dtype=self.dtype, device="meta")[0 if self.aligned else 1 :]


def built(value: Any) -> Any:
    """A described argument as compilation takes it: tensors where they were, in named tuples too."""
    if isinstance(value, TensorArgument):
        return value.build()
    return type(value)(*map(built, value)) if isinstance(value, tuple) else value


class Job(NamedTuple):
    """One kernel with the arguments and options that decide its code."""

    module: str
    kernel: str
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compile(self) -> Any:
        """What Triton made of it: from its cache, where it is there already."""
        arguments = {name: built(value) for name, value in self.arguments.items()}
        return getattr(importlib.import_module(self.module), self.kernel).warmup(grid=(1,), **arguments, **self.options)


class _TargetOnly:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._capability, self._target = capability, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def become_compiler(capability: int) -> None:
    """From here on this process compiles for ``capability`` (90 is Hopper) and can launch nothing."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_TargetOnly(capability))


def main() -> int:
    capability, jobs = pickle.load(sys.stdin.buffer)
    become_compiler(capability)
    failed = []
    for job in jobs:
        try:
            job.compile()
        except Exception as error:  # the caller raises, with all that failed
            failed.append(f"{job.kernel}: {type(error).__name__}: {error}"[:500])
    json.dump(failed, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
