"""What executed instructions move, beside the least that they could: wavefronts of shared, sectors of global memory.

A wavefront is a cycle of a processor's shared memory, in which each of its 32 banks gives or takes one word of 4 bytes.
A warp's access takes one; of 8 bytes a thread one for each half of it, of 16 bytes for each quarter, and ldmatrix one
for each matrix (eight rows of 16 bytes); more where different words of those threads lie in one bank. The fewest are
those without such conflicts. A sector is 32 bytes of global memory, what L2 gives at the least; the fewest hold the
bytes that a warp's access wants.

Copies by tensor descriptors and wgmma's operands go past the threads, and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import machine
from .bits import Array, size_of
from .machine import Machine, Mask, Step
from .parse import Kernel, listed

BANKS, WORD, SECTOR = 32, 4, 32


@dataclass
class Count:
    """How many warps executed something, the wavefronts or sectors that it took, and the fewest."""

    warps: int = 0
    taken: int = 0
    fewest: int = 0

    def add(self, other: Count) -> None:
        self.warps += other.warps
        self.taken += other.taken
        self.fewest += other.fewest

    @property
    def ratio(self) -> float:
        return self.taken / self.fewest if self.fewest else 1.0


class Place(NamedTuple):
    """An instruction of a kernel, and the memory that it touches: shared or global."""

    kernel: Kernel
    at: int
    memory: str


@dataclass
class Traffic:
    counts: dict[Place, Count] = field(default_factory=dict)

    def total(self, memory: str, kernel: str = "") -> Count:
        """Of all instructions of the kernels of one name, or of all kernels."""
        found = Count()
        for place, count in self.counts.items():
            if place.memory == memory and kernel in ("", place.kernel.name):
                found.add(count)
        return found

    def watch(self, machine: Machine, at: int) -> list[Step]:
        """Counts an instruction's accesses, if it makes any, before it is executed."""
        instruction = machine.kernel.code[at]
        opcode, operands = instruction.opcode, instruction.operands
        kind, where = opcode[0], opcode[1].partition("::")[0] if len(opcode) > 1 else ""
        steps: list[Step] = []

        def accesses(memory: str, operand: str, nbytes: int, lanes: Callable[[Mask], Array]) -> None:
            read = machine.address(operand, 32 if memory == "shared" else 64)
            count, of = self.counts.setdefault(Place(machine.kernel, at, memory), Count()), COUNTED[memory]
            steps.append(lambda mask: count.add(of(some := lanes(mask), read()[some], nbytes)))

        if kind in ("ld", "st") and where in COUNTED:
            address, values = operands if kind == "st" else operands[::-1]
            accesses(where, address, size_of(opcode[-1]) // 8 * len(listed(values)), machine.picked)
        elif kind in ("ldmatrix", "stmatrix"):
            address, values = operands if kind == "stmatrix" else operands[::-1]
            rows = 8 * len(listed(values))  # the threads of a warp that hold a row's address
            accesses("shared", address, 16, lambda mask: (found := machine.picked(mask))[found % 32 < rows])
        elif opcode[:2] == ("cp", "async") and opcode[2] in ("ca", "cg"):
            nbytes = int(operands[2], 0)
            given = machine.source(operands[3], 32) if len(operands) > 3 else None

            def read_by(mask: Mask) -> Array:
                found = machine.picked(mask)
                return found if given is None else found[given()[found] > 0]

            accesses("shared", operands[0], nbytes, machine.picked)
            accesses("global", operands[1], nbytes, read_by)
        return steps


@contextmanager
def counted() -> Iterator[Traffic]:
    """What machines that are built inside move."""
    traffic = Traffic()
    machine.WATCHES.append(traffic.watch)
    try:
        yield traffic
    finally:
        machine.WATCHES.remove(traffic.watch)


def wavefronts(lanes: Array, addresses: Array, nbytes: int) -> Count:
    """Of one access of ``nbytes`` by each of some threads to shared memory."""
    words = max(nbytes // WORD, 1)
    phase = lanes // (BANKS // words)
    word = addresses.astype(np.int64)[:, None] // WORD + np.arange(words)
    asked = np.unique((phase[:, None] << 32 | word).reshape(-1))  # one word for several threads comes once
    banks, conflicts = np.unique((asked >> 32) * BANKS + asked % BANKS, return_counts=True)
    phases, first = np.unique(banks // BANKS, return_index=True)
    taken = np.maximum.reduceat(conflicts, first).sum() if len(first) else 0
    return Count(len(np.unique(lanes // 32)), int(taken), len(phases))


def sectors(lanes: Array, addresses: Array, nbytes: int) -> Count:
    """Of one access of ``nbytes`` by each of some threads to global memory."""
    warp, addresses = lanes // 32, addresses.astype(np.int64)
    taken = np.unique(np.stack([warp, addresses // SECTOR]), axis=1).shape[1]
    different = np.unique(np.stack([warp, addresses]), axis=1)[0]
    _, wanted = np.unique(different, return_counts=True)
    return Count(len(wanted), taken, int((-(-wanted * nbytes // SECTOR)).sum()))


COUNTED = {"shared": wavefronts, "global": sectors}
