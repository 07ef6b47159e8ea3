"""A step without its kernels: every line of Python that the host runs, planned for a GPU, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.compiler import CompiledKernel
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fused_resnet.launch import replay
from fused_resnet.plan.target import Assumption, Target, assume


@contextmanager
def launches_left_out(target: Target) -> Iterator[None]:
    """Inside, plans are for ``target``, and a launch does nothing; the vendor's convolutions run."""
    kinds: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    originals = [kind.__getitem__ for kind in kinds]
    for kind in kinds:
        kind.__getitem__ = lambda self, grid: _launched
    replay.forget()
    try:
        with assume(Assumption(target)):
            yield
    finally:
        replay.forget()
        for kind, original in zip(kinds, originals, strict=True):
            kind.__getitem__ = original


class _LeftOut(CompiledKernel):
    """What launching returns, which a replay calls the next time: it does nothing."""

    def __init__(self) -> None:
        self.module = None  # asked for when it is forgotten

    def __getitem__(self, grid: Any) -> Any:
        return _nothing


def _nothing(*_arguments: Any) -> None:
    """Stands in for a compiled kernel with its grid."""


def _launched(*_arguments: Any, **_keywords: Any) -> CompiledKernel:
    """Stands in for a kernel with its grid."""
    return _LeftOut()
