"""A step without its kernels: every line of Python that the host runs, planned for a GPU, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fused_resnet.launch import replay, vendor
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import Assumption, Target, assume


@contextmanager
def launches_left_out(target: Target, *, vendors: bool = False) -> Iterator[None]:
    """Inside, plans are for ``target``, and a launch does nothing. The vendor's convolutions run.

    ``vendors``: they do nothing either, beyond asking for the memory of their results.
    """
    with mock.patch.multiple(vendor, **_MEMORY_ALONE) if vendors else nullcontext(), _ours_left_out(target):
        yield


@contextmanager
def _ours_left_out(target: Target) -> Iterator[None]:
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


# ----- the vendor's convolutions, which compute nothing -----


def _image(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fprop(x: Tensor, weight: Tensor, problem: ConvProblem) -> Tensor:
    return _image(x, problem.N, problem.Co, problem.P, problem.Q)


def _dgrad(dy: Tensor, x: Tensor, weight: Tensor, problem: ConvProblem) -> Tensor:
    return _image(dy, *x.shape)


def _wgrad(x: Tensor, dy: Tensor, weight: Tensor, problem: ConvProblem) -> Tensor:
    return _image(dy, *weight.shape)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, problem: ConvProblem) -> tuple[Tensor, Tensor]:
    return _dgrad(dy, x, weight, problem), _wgrad(x, dy, weight, problem)


_MEMORY_ALONE = {"conv_fprop": _fprop, "conv_dgrad": _dgrad, "conv_wgrad": _wgrad, "conv_backward": _backward}
