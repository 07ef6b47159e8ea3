"""What was found out once for tensors of a kind, found again for their like: nothing but their metadata is read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

Found = TypeVar("Found")

LIMIT = 4096
"""Kinds that are kept; beyond them all are forgotten, as a job of ever new sizes would have it."""


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody else has a say in what operators do with ``tensors``: no dispatch mode, no subclass."""
    return not torch._C._len_torch_dispatch_stack() and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class Alike:
    """Whether tensors have the class, dtype, device, shape, strides and requires_grad of those given first.

    PyTorch's own guard, that of its compiler, also sees to the state they are used in: autocast, inference mode.
    ``aligned``: and each begins as far from a multiple of 16 bytes, for which Triton compiles differently.
    """

    def __init__(self, tensors: Sequence[Tensor], aligned: bool) -> None:
        sizes: Any = [[*t.shape] for t in tensors]
        strides: Any = [[*t.stride()] for t in tensors]
        self._guard: Any = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._offsets = _offsets(tensors) if aligned else None

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        return self._guard.check(*tensors) and (self._offsets is None or _offsets(tensors) == self._offsets)


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() & 15 for t in tensors]


class Kinds(Generic[Found]):
    """By a key, and by tensors alike, whose number follows from the key; ``aligned``: see :class:`Alike`."""

    def __init__(self, aligned: bool) -> None:
        self._aligned = aligned
        self._found: dict[Hashable, list[tuple[Alike, Found]]] = {}
        self._count = 0

    def find(self, key: Hashable, tensors: Sequence[Tensor]) -> Found | None:
        for alike, found in self._found.get(key, ()):
            if alike(tensors):
                return found
        return None

    def remember(self, key: Hashable, tensors: Sequence[Tensor], found: Found) -> None:
        if len({id(t) for t in tensors}) < len(tensors) or _holds_tensor(key):
            return  # the guard takes no tensor for two, and a number in a tensor is another one tomorrow
        if self._count >= LIMIT:
            self.clear()
        self._count += 1
        self._found.setdefault(key, []).append((Alike(tensors, self._aligned), found))

    def clear(self) -> None:
        self._found.clear()
        self._count = 0


def _holds_tensor(key: Hashable) -> bool:
    return isinstance(key, Tensor) or (isinstance(key, tuple) and any(map(_holds_tensor, key)))
