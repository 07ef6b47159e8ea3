"""Reads a kernel's machine code: its main loop, what the instructions in it are for, how wide they reach memory.

Static: an instruction counts once wherever it stands, taken or not. Each of a processor's four schedulers issues one
instruction a cycle at the most, so ``issue_cycles`` is a lower bound, and a kernel may take longer for any of the
reasons that no listing shows: latency, conflicts, pipes that take two cycles or eight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .occupancy import SCHEDULERS, run_on

FLOP_PER_CYCLE = {80: 2048, 90: 4096}
"""Of a processor's tensor cores, dense, 16 bits: the data sheets' rates over processors and boost clock."""
WIDE = 16
"""Bytes of a thread's widest access; what is narrower takes more instructions for the same bytes."""

KINDS = {
    "tensor": ("HGMMA", "HMMA", "IGMMA", "IMMA", "QGMMA", "QMMA", "DMMA", "BMMA"),
    "wait": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "CCTL",
             "YIELD", "ARRIVES", "NANOSLEEP", "ACQBULK", "UCGABAR_ARV", "UCGABAR_WAIT"),
    "global": ("LDG", "STG", "LDGSTS", "LD", "ST", "ATOM", "ATOMG", "RED", "UTMALDG", "UTMASTG", "UTMAPF", "UBLKCP"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL", "VOTE", "MATCH", "REDUX"),
    "control": ("BRA", "BRX", "JMP", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "BMOV"),
    "convert": ("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP", "FRND", "PRMT"),
    "float": ("HADD2", "HFMA2", "HMUL2", "HSETP2", "HSET2", "HMNMX2", "MUFU"),
}  # fmt: skip
"""What an instruction is for, by the first part of its name; others are "float" (F..., D...) or else "integer"."""
_KIND = {name: kind for kind, names in KINDS.items() for name in names}
_FLOAT = re.compile(r"(F|D)(ADD|MUL|FMA|MNMX|SEL|SET|SETP|CHK|SWZADD)\b")
_WIDENS = re.compile(r"IMAD\.U32 .*, 0x10000,|SHF\.L\.U32 .*, 0x10, RZ|LOP3\.LUT .*, 0xffff0000, RZ, 0xc0|HADD2\.F32 ")
"""How bfloat16 (a shift, a mask) and float16 (an addition) become float32."""
SLOW = ("F2F", "F2I", "I2F", "FRND", "MUFU")
"""What the unit of the transcendental functions does, at a quarter of the others' rate or less."""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"\s*(\.L_\w+):")


class Instruction(NamedTuple):
    name: str
    operands: str

    @property
    def stem(self) -> str:
        return self.name.partition(".")[0]

    @property
    def kind(self) -> str:
        if _WIDENS.match(f"{self.name} {self.operands.strip()}"):
            return "convert"
        return _KIND.get(self.stem) or ("float" if _FLOAT.match(self.stem) else "integer")

    @property
    def width(self) -> int:
        """Bytes that a thread moves, of an access to memory."""
        if found := re.search(r"\.(128|64|32|[US]?16|[US]?8)\b", self.name):
            return int(found[1].lstrip("US")) // 8
        return 4

    @property
    def flop(self) -> float:
        """Of a tensor instruction, as one warp issues it."""
        if shape := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", self.name):
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k / 4  # four warps issue it together
        if shape := re.match(r"[HQI]MMA\.(16)(8)(\d+)", self.name):
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k
        return 0.0


@dataclass(frozen=True)
class Body:
    """Some of a kernel's instructions, as ``warps`` warps run them."""

    instructions: tuple[Instruction, ...]
    warps: int

    @cached_property
    def mix(self) -> Counter[str]:
        """How many instructions there are of each kind."""
        return Counter(i.kind for i in self.instructions)

    @property
    def issue_cycles(self) -> float:
        return len(self.instructions) * self.warps / SCHEDULERS

    @property
    def flop(self) -> float:
        """Of one program."""
        return sum(i.flop for i in self.instructions) * self.warps

    @property
    def slow(self) -> int:
        return sum(i.stem in SLOW for i in self.instructions)

    def accesses(self, *stems: str) -> list[Instruction]:
        return [i for i in self.instructions if i.stem in (stems or ("LDG", "LDGSTS", "LD", "STG", "ST"))]

    def moved(self, *stems: str) -> int:
        """Bytes of global memory that one program reads or writes."""
        return sum(i.width for i in self.accesses(*stems)) * 32 * self.warps

    @property
    def narrow(self) -> Counter[str]:
        """Accesses to global memory of fewer than 16 bytes: "load 4" or "store 2", and how many."""
        found = [i for i in self.accesses() if i.width < WIDE]
        return Counter(f"{'store' if i.stem.startswith('ST') else 'load'} {i.width}" for i in found)

    @property
    def in_flight(self) -> int:
        """Bytes that one program has asked for and not waited for, at the most, while it goes round as a loop.

        Asynchronous copies: the groups that its wait leaves pending and those that it begins. Loads into registers: one
        round's.
        """
        groups = len(self.accesses("LDGDEPBAR"))
        waits = [i for i in self.instructions if i.stem == "DEPBAR" and "SB0" in i.operands]
        pending = max((int(i.operands.rpartition(",")[2].strip(), 16) for i in waits), default=0)
        rounds = 1 + pending / groups if groups else 1
        return round(self.moved("LDGSTS") * rounds) + self.moved("LDG", "LD")


@dataclass(frozen=True)
class Code:
    """A whole kernel."""

    whole: Body
    loop: Body | None
    """The main loop: the innermost one with the most tensor work, or without any, with the most bytes."""

    @property
    def outside(self) -> Body:
        """What is not the main loop."""
        inside = Counter(map(id, self.loop.instructions if self.loop else ()))
        return Body(tuple(i for i in self.whole.instructions if not inside[id(i)]), self.whole.warps)

    @property
    def uses_descriptors(self) -> bool:
        return bool(self.whole.accesses("UTMALDG"))


def disassembled(cubin: bytes) -> str:
    """The listing. FileNotFoundError: Triton came without the disassembler."""
    return run_on(cubin, "nvdisasm", "-c")


def parsed(text: str, warps: int) -> Code:
    """A kernel's instructions and its main loop, from its listing."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := _INSTRUCTION.search(line)) and found[1] != "NOP":
            instructions.append(Instruction(found[1], found[2]))
    bodies = [Body(tuple(instructions[first : end + 1]), warps) for first, end in _innermost(instructions, labels)]
    working = [body for body in bodies if body.flop or body.moved() or body.accesses("UTMALDG")]
    main = max(working, key=lambda body: (body.flop, body.moved(), len(body.instructions)), default=None)
    return Code(Body(tuple(instructions), warps), main)


def _innermost(instructions: list[Instruction], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """First and last instruction of each loop that holds no other that works on memory or on tensor cores."""
    found = list(_loops(instructions, labels))
    working = [(first, end) for first, end in found if _works(instructions[first : end + 1])]
    for first, end in working:
        if not any((first, end) != (a, b) and first <= a and b <= end for a, b in working):
            yield first, end


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    for end, instruction in enumerate(instructions):
        target = re.search(r"(\.L_\w+)", instruction.operands)
        if instruction.stem == "BRA" and target and labels.get(target[1], end) < end:
            yield labels[target[1]], end


def _works(body: Iterable[Instruction]) -> bool:
    return any(i.kind in ("tensor", "global") for i in body)
