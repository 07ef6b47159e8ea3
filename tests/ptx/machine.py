"""Executes a parsed kernel: all threads of some programs in step, one array element a thread.

Threads that branch apart go on where the code comes first, until they meet again. Barriers among threads therefore
wait for nobody; what a thread may not rely on without them is seen in one place only, asynchronous copies, which
arrive when their group was waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import threads, warps
from .arithmetic import operation
from .bits import UNSIGNED, Array, literal
from .bulk import Barriers, TensorMap
from .memory import BASE, OWN, Fault, Global, Local, Shared
from .parse import Instruction, Kernel, address

Mask = Array | None
"""Which threads execute an instruction; None: all."""
Step = Callable[[Mask], None]
Parts = tuple[str, ...]
Watch = Callable[["Machine", int], list[Step]]
"""Asked of each instruction of a new machine: what is to be done before it is executed."""
WATCHES: list[Watch] = []
ORDER = {"bar", "barrier", "fence", "membar", "griddepcontrol"}
"""What orders threads, which go in step here."""
HINTS = {"nanosleep", "prefetch", "discard", "applypriority"}
"""What asks for nothing but speed."""
JUMPS = {"bra", "brx", "ret", "exit", "branchtargets"}
"""What decides where threads go on, and the tables for it."""
WGMMA = {("wgmma", "fence"), ("wgmma", "commit_group"), ("wgmma", "wait_group")}
NOTHING_TO_DO = ORDER | HINTS | JUMPS
BUILDERS = warps.BUILDERS | threads.BUILDERS


class Machine:
    """Some programs of a launch.

    ``parameters``: the bits of each by name; ``programs``: [n, 3] of their numbers.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: dict[str, int],
        memory: Global,
        programs: Array,
        grid: tuple[int, int, int],
        shared: int,
        maps: list[TensorMap],
    ) -> None:
        self.kernel, self.parameters, self.memory, self.maps = kernel, parameters, memory, maps
        self.threads, self.lanes = kernel.threads, len(programs) * kernel.threads
        self.program = np.repeat(np.arange(len(programs)), kernel.threads)
        self._all = np.arange(self.lanes)
        self.shared, self.local = Shared(len(programs), shared, self.program), Local(self.lanes, kernel.local)
        self.barriers, self.waited = Barriers(), 0
        thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), len(programs))
        zero = np.zeros(self.lanes, np.uint32)
        self.registers: dict[str, Array] = {"%tid.x": thread, "%laneid": thread % np.uint32(32), "%tid.y": zero}
        self.registers["%tid.z"] = zero
        for place, axis in enumerate("xyz"):
            self.registers[f"%ctaid.{axis}"] = np.repeat(programs[:, place].astype(np.uint32), kernel.threads)
            self.registers[f"%nctaid.{axis}"] = zero + np.uint32(grid[place])
            self.registers[f"%ntid.{axis}"] = zero + np.uint32(kernel.threads if place == 0 else 1)
        self.steps = [self._built(instruction) for instruction in kernel.code]
        for watch in WATCHES:
            self.steps = [_in_order([*watch(self, at), step]) for at, step in enumerate(self.steps)]

    # ---------------------------------------------------------------- control

    def run(self) -> None:
        """Until every thread has returned."""
        code, groups = self.kernel.code, {0: np.ones(self.lanes, bool)}
        while groups:
            at = min(groups)
            active = groups.pop(at)
            whole = bool(active.all())
            limit = min(groups, default=len(code))
            while at < limit:
                instruction = code[at]
                mask = None if whole else active
                if instruction.guard is not None:
                    name, wanted = instruction.guard
                    held = self.register(name, 1) if wanted else ~self.register(name, 1)
                    mask = held if mask is None else held & mask
                    mask = None if mask.all() else mask
                if instruction.opcode[0] in ("bra", "brx", "ret", "exit"):
                    gone = active if mask is None else mask & active
                    for target, some in self._targets(instruction, gone):
                        groups[target] = groups[target] | some if target in groups else some
                    active = active & ~gone
                    if gone.any():
                        break
                elif mask is None or mask.any():
                    try:
                        self.steps[at](mask)
                    except Fault as fault:
                        raise Fault(f"{fault}\n    {instruction.text}") from None
                at += 1
            else:
                at -= 1
            if active.any():
                following = at + 1
                if following >= len(code):
                    raise Fault("threads ran past the end of the code")
                groups[following] = groups[following] | active if following in groups else active

    def _targets(self, jump: Instruction, threads: Array) -> list[tuple[int, Array]]:
        """Where ``threads`` go on, and which of them where: nowhere after a return."""
        labels = self.kernel.labels
        if jump.opcode[0] == "bra":
            found = [(labels[jump.operands[0]], threads)]
        elif jump.opcode[0] == "brx":
            chosen, table = self.register(jump.operands[0], 32), self.kernel.code[labels[jump.operands[1]]].operands
            found = [(labels[label], threads & (chosen == place)) for place, label in enumerate(table)]
        else:
            found = []
        return [(target, some) for target, some in found if some.any()]

    # ---------------------------------------------------------------- operands

    def source(self, operand: str, size: int) -> Callable[[], Any]:
        """Reads a register, an immediate or an address as bits."""
        if operand.startswith("%"):
            return lambda: self.register(operand, size)
        if operand.startswith("__local_depot"):
            return lambda: np.full(self.lanes, OWN, np.uint64)
        if operand == "global_smem":
            return lambda: np.full(self.lanes, BASE, UNSIGNED[size])
        if operand in self.parameters:
            return lambda: np.full(self.lanes, self.parameters[operand], np.uint64)
        if operand[0].isdigit() or operand[0] == "-":
            value = np.full(self.lanes, literal(operand, size))
            return lambda: value
        return lambda: self.register(operand, size)  # declared by inline assembly

    def register(self, name: str, size: int) -> Array:
        """Of a register that nobody wrote, all ones: NaN."""
        found = self.registers.get(name)
        if found is None:
            ones = np.bool_(True) if size == 1 else UNSIGNED[size]((1 << size) - 1)
            found = self.registers[name] = np.full(self.lanes, ones)
        return found

    def write(self, register: str, value: Array, mask: Mask) -> None:
        if register in ("_", "%_"):
            return
        if np.ndim(value) == 0:
            value = np.full(self.lanes, value)
        if mask is not None:
            before = self.registers.get(register)
            value = np.where(mask, value, np.zeros_like(value) if before is None else before)
        self.registers[register] = value

    def picked(self, mask: Mask) -> Array:
        return self._all if mask is None else np.flatnonzero(mask)

    def address(self, operand: str, size: int) -> Callable[[], Array]:
        base, offset = address(operand)
        read = self.source(base, size)
        return lambda: read().astype(UNSIGNED[size]) + UNSIGNED[size](offset & ((1 << size) - 1))

    def together(self, mask: Mask, size: int) -> Array:
        """Which warps, or groups of four, execute an instruction: all of their threads do."""
        if mask is None:
            return np.arange(self.lanes // size)
        some = mask.reshape(-1, size)
        if (some.any(1) != some.all(1)).any():
            raise Fault("threads of a warp are apart")
        return np.flatnonzero(some.all(1))

    def by(self, size: int, value: Array, chosen: Array) -> Array:
        """[chosen warps or groups, size] of a register."""
        return value.reshape(-1, size)[chosen]

    def give(self, register: str, values: Array, chosen: Array, mask: Mask) -> None:
        """Writes the register of the chosen warps or groups."""
        whole = np.zeros((self.lanes // values.shape[1], values.shape[1]), values.dtype)
        whole[chosen] = values
        self.write(register, whole.reshape(-1), mask)

    def each(self, mask: Mask) -> list[tuple[int, int]]:
        lanes = self.picked(mask)
        return [(int(lane), int(self.program[lane])) for lane in lanes]

    # ---------------------------------------------------------------- instructions

    def _built(self, instruction: Instruction) -> Step:
        """What executes an instruction. NotImplementedError names one that nobody taught."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode[0] in NOTHING_TO_DO or opcode[:2] in WGMMA:
            return lambda mask: None
        for start, build in BUILDERS.items():
            if opcode[: len(start)] == start:
                return build(self, opcode, operands)
        function = operation(opcode)
        if function is None:
            raise NotImplementedError(instruction.text)
        return threads.plain(self, opcode, operands, function)


def _in_order(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]

    def step(mask: Mask) -> None:
        for each in steps:
            each(mask)

    return step
