"""Copies of boxes by tensor descriptors, and the barriers in shared memory that count their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .bits import UNSIGNED, Array
from .matrices import swizzled
from .memory import Fault, Global, Shared


@dataclass(frozen=True)
class TensorMap:
    """What a descriptor says: where the tensor is, its sizes and strides (elements), the box, the pattern (bytes)."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    pattern: int

    def places(self, corner: tuple[int, ...]) -> tuple[Array, Array]:
        """Addresses of a box's elements in order, and which of them are inside. ``corner``: innermost size first."""
        index = np.indices(self.box).reshape(len(self.box), -1).astype(np.int64)
        index += np.array(corner[::-1], np.int64)[:, None]
        inside = ((index >= 0) & (index < np.array(self.shape)[:, None])).all(0)
        offset = (index * np.array(self.strides, np.int64)[:, None]).sum(0)
        return (np.where(inside, offset, 0) * self.itemsize + self.start).astype(np.uint64), inside

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def _in_shared(self, shared: Shared, program: int, address: int) -> Array:
        """Where the elements of a box lie from ``address`` on."""
        first = int(shared.offsets(np.array([program]), np.array([address]), self.nbytes, aligned=128)[0])
        return swizzled(first + np.arange(0, self.nbytes, self.itemsize), self.pattern) // self.itemsize

    def load(self, memory: Global, shared: Shared, lane: int, address: int, corner: tuple[int, ...]) -> None:
        addresses, inside = self.places(corner)
        values = np.zeros(len(addresses), UNSIGNED[8 * self.itemsize])
        if inside.any():
            values[inside] = memory.read(addresses[inside], self.itemsize)[:, 0]
        shared.raw.view(values.dtype)[self._in_shared(shared, lane, address)] = values

    def store(self, memory: Global, shared: Shared, lane: int, address: int, corner: tuple[int, ...]) -> None:
        addresses, inside = self.places(corner)
        if not inside.any():
            raise Fault("a store to a box that lies wholly outside of its tensor: hardware traps")
        values = shared.raw.view(UNSIGNED[8 * self.itemsize])[self._in_shared(shared, lane, address)]
        memory.write(addresses[inside], values[inside, None])


@dataclass
class _Barrier:
    expected: int
    arrivals: int
    nbytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.arrivals == 0 and self.nbytes == 0:
            self.phase, self.arrivals = self.phase ^ 1, self.expected


@dataclass
class Barriers:
    """mbarriers by program and address."""

    known: dict[tuple[int, int], _Barrier] = field(default_factory=dict)

    def start(self, program: int, address: int, count: int) -> None:
        self.known[program, address] = _Barrier(count, count)

    def end(self, program: int, address: int) -> None:
        if self.known.pop((program, address), None) is None:
            raise Fault("the end of a barrier that never began")

    def _at(self, program: int, address: int) -> _Barrier:
        found = self.known.get((program, address))
        if found is None:
            raise Fault("no barrier there")
        return found

    def arrive(self, program: int, address: int, nbytes: int) -> None:
        barrier = self._at(program, address)
        barrier.arrivals, barrier.nbytes = barrier.arrivals - 1, barrier.nbytes + nbytes
        if barrier.arrivals < 0:
            raise Fault("more arrivals than a barrier expects")
        barrier.settle()

    def complete(self, program: int, address: int, nbytes: int) -> None:
        barrier = self._at(program, address)
        barrier.nbytes -= nbytes
        barrier.settle()

    def is_past(self, program: int, address: int, parity: int) -> bool:
        return self._at(program, address).phase != parity
