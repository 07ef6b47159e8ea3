"""Global memory as tensors, with their bounds; shared memory of each program; copies that arrive when waited for."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .bits import UNSIGNED, Array

BASE = 1024
"""Where shared memory begins, so that an address of nothing is outside."""


OWN = 1 << 62
"""Where the threads' own memory begins; each sees its own there."""


class Fault(RuntimeError):
    """What a GPU answers with an illegal or misaligned address, or never."""


@dataclass(frozen=True)
class Allocation:
    start: int
    raw: Array


class Global:
    """The storages of some tensors. Everything else is an illegal address."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        found = []
        for start, storage in sorted(storages.items()):
            memory = (ctypes.c_uint8 * storage.nbytes()).from_address(start)
            found.append(Allocation(start, np.frombuffer(memory, np.uint8)))
        self._allocations = found
        self._starts = np.array([allocation.start for allocation in found], np.uint64)
        self._ends = np.array([allocation.start + len(allocation.raw) for allocation in found], np.uint64)

    def _where(self, addresses: Array, nbytes: int) -> Array:
        """The allocation of each address."""
        if len(self._starts) == 0:
            raise Fault("there is no memory")
        index = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        outside = (index < 0) | (addresses + np.uint64(nbytes) > self._ends[np.maximum(index, 0)])
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            near = self._allocations[max(int(index[lane]), 0)]
            beyond = int(addresses[lane]) - near.start - len(near.raw)
            raise Fault(f"illegal address: {nbytes} bytes, {beyond} bytes beyond a tensor of {len(near.raw)} bytes")
        if (addresses % np.uint64(nbytes)).any():
            raise Fault(f"misaligned address for an access of {nbytes} bytes")
        return index

    def read(self, addresses: Array, size: int, count: int = 1) -> Array:
        """[lanes, count] values of ``size`` bytes from each address on."""
        index, out = self._where(addresses, size * count), np.empty((len(addresses), count), UNSIGNED[8 * size])
        for number in np.unique(index):
            lanes, allocation = index == number, self._allocations[number]
            out[lanes] = _elements(allocation.raw, size)[self._offsets(addresses[lanes], allocation, size, count)]
        return out

    def write(self, addresses: Array, values: Array) -> None:
        """``values`` [lanes, count] from each address on."""
        size, count = values.dtype.itemsize, values.shape[1]
        index = self._where(addresses, size * count)
        for number in np.unique(index):
            lanes, allocation = index == number, self._allocations[number]
            _elements(allocation.raw, size)[self._offsets(addresses[lanes], allocation, size, count)] = values[lanes]

    @staticmethod
    def _offsets(addresses: Array, allocation: Allocation, size: int, count: int) -> Array:
        first = (addresses - np.uint64(allocation.start)).astype(np.int64) // size
        return first[:, None] + np.arange(count)


def _elements(raw: Array, size: int) -> Array:
    return raw[: len(raw) // size * size].view(UNSIGNED[8 * size])


class Local:
    """The memory of each thread, which generic addresses from :data:`OWN` on reach."""

    def __init__(self, lanes: int, nbytes: int) -> None:
        self._raw = np.full((lanes, nbytes), 0xFF, np.uint8)

    def _at(self, lanes: Array, addresses: Array, nbytes: int) -> tuple[Array, Array]:
        offsets = (addresses - np.uint64(OWN)).astype(np.int64)
        if ((offsets < 0) | (offsets + nbytes > self._raw.shape[1])).any():
            raise Fault("illegal address of a thread's own memory")
        return lanes[:, None], offsets[:, None] + np.arange(nbytes)

    def read(self, lanes: Array, addresses: Array, size: int, count: int = 1) -> Array:
        return np.ascontiguousarray(self._raw[self._at(lanes, addresses, size * count)]).view(UNSIGNED[8 * size])

    def write(self, lanes: Array, addresses: Array, values: Array) -> None:
        size = values.dtype.itemsize * values.shape[1]
        self._raw[self._at(lanes, addresses, size)] = np.ascontiguousarray(values).view(np.uint8)


class Shared:
    """The shared memory of ``programs``, NaN at first; ``program``: of each thread."""

    def __init__(self, programs: int, nbytes: int, program: Array) -> None:
        self._stride = -(-(BASE + nbytes) // 1024) * 1024
        self.raw = np.full(programs * self._stride, 0xFF, np.uint8)
        self._limit, self._program = BASE + nbytes, program
        self._now: list[tuple[Array, Array]] = []
        self._groups: list[list[tuple[Array, Array]]] = []

    def offsets(self, lanes: Any, addresses: Array, nbytes: int, aligned: int | None = None) -> Array:
        """Where in :attr:`raw` the bytes of each lane begin."""
        addresses = addresses.astype(np.int64)
        if ((addresses < BASE) | (addresses + nbytes > self._limit)).any():
            raise Fault(
                f"illegal shared address among {np.unique(addresses)[[0, -1]] - BASE}: {self._limit - BASE} bytes"
            )
        if (addresses % (aligned or nbytes)).any():
            raise Fault(f"misaligned shared address for an access of {aligned or nbytes} bytes")
        return self._program[lanes] * self._stride + addresses

    def read(self, lanes: Any, addresses: Array, size: int, count: int = 1) -> Array:
        first = self.offsets(lanes, addresses, size * count) // size
        return _elements(self.raw, size)[first[:, None] + np.arange(count)]

    def write(self, lanes: Any, addresses: Array, values: Array) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        first = self.offsets(lanes, addresses, size * count) // size
        _elements(self.raw, size)[first[:, None] + np.arange(count)] = values

    def copy_later(self, lanes: Any, addresses: Array, values: Array) -> None:
        """cp.async: the bytes ``values`` [lanes, n] arrive when their group was waited for."""
        self._now.append((self.offsets(lanes, addresses, values.shape[1]), values))

    def commit(self) -> None:
        self._groups.append(self._now)
        self._now = []

    def wait(self, pending: int) -> None:
        """Until at most so many groups are on their way."""
        while len(self._groups) > pending:
            for first, values in self._groups.pop(0):
                self.raw[first[:, None] + np.arange(values.shape[1])] = values
