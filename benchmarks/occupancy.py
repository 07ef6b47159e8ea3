"""How many programs of a compiled kernel share a processor, what keeps it from more, and in how many waves they run."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends import nvidia

TOOLS = Path(nvidia.__file__).parent / "bin"
"""The vendor's tools that come with Triton."""

RESERVED = 1024
"""Bytes of shared memory that every program takes beside what it asks for."""
REGISTERS, SCHEDULERS = 65_536, 4


class Processor(NamedTuple):
    """What a multiprocessor holds at a time; the registers are as many everywhere."""

    shared: int
    threads: int
    programs: int


PROCESSORS = {
    80: Processor(167_936, 2048, 32),
    86: Processor(102_400, 1536, 16),
    89: Processor(102_400, 1536, 24),
    90: Processor(233_472, 2048, 32),
    100: Processor(233_472, 2048, 32),
    120: Processor(102_400, 1536, 24),
}
"""By compute capability: the CUDA programming guide's table of technical specifications."""


class Resources(NamedTuple):
    """Registers and bytes of local memory of a thread: what spilled, and what has to lie in memory."""

    registers: int
    local: int


def run_on(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the vendor's tools prints about a binary. FileNotFoundError: Triton came without it."""
    if not (TOOLS / tool).exists():
        raise FileNotFoundError(f"this Triton came without {tool}, which reads compiled kernels (looked in {TOOLS})")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr.strip()}")
    return done.stdout


def resources(cubin: bytes) -> Resources:
    text = run_on(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    return Resources(int(found[1]), int(found[2]) + int(found[3]))


class Occupancy(NamedTuple):
    programs: int
    limit: str
    """"registers", "shared memory" or "threads"."""


def occupancy(registers: int, shared: int, warps: int, sm: int) -> Occupancy:
    """Of a program with so many registers a thread, bytes of shared memory, and warps."""
    processor = PROCESSORS[sm]
    per_warp = 32 * -(-max(registers, 1) // 8) * 8
    fitting = {
        "registers": SCHEDULERS * (REGISTERS // SCHEDULERS // per_warp) // warps,
        "shared memory": processor.shared // (shared + RESERVED),
        "threads": min(processor.threads // (32 * warps), processor.programs),
    }
    limit = min(fitting, key=lambda name: fitting[name])
    return Occupancy(fitting[limit], limit)


class Waves(NamedTuple):
    number: float
    last: float
    """How full the last one is, of 1."""


def waves(programs: int, per_sm: int, sm_count: int) -> Waves:
    """Of a grid of ``programs``, ``per_sm`` of which a processor holds at a time."""
    number = programs / (per_sm * sm_count)
    return Waves(number, 1.0 - (math.ceil(number) - number))
