"""The kernels of a network's step, compiled for a GPU that need not be there, and what their machine code tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fused_resnet.compile_worker import Job, become_compiler
from fused_resnet.explain import assumption_of, image_like
from fused_resnet.jobs import Jobs, compile_all
from fused_resnet.launch.record import Launch, Rehearsed
from fused_resnet.plan.cost import floor_seconds
from fused_resnet.plan.target import Target, assume
from fused_resnet.projection import launch_us
from fused_resnet.rehearsal import rehearse

from .occupancy import occupancy, resources, waves
from .sass import FLOP_PER_CYCLE, Code, disassembled, parsed

CLOCK = {80: 1.41e9, 90: 1.83e9}
"""Cycles a second at which the data sheets' matrix rates hold."""
SIZES = ("M", "rows", "N", "H", "W", "P", "Q", "pixels", "Ci", "Co", "C", "channels", "split", "tiles", "elements")
"""The integers that say what a launch works on, as far as a kernel has them."""


class Shape(NamedTuple):
    """One kernel as one launch of a step has it."""

    kernel: str
    sizes: str
    options: str
    """Its flags that are set."""
    tile: str


@dataclass(frozen=True)
class Row:
    """What the compiler made of the alike launches of a step. Times are of all ``count`` of them."""

    kernel: str
    sizes: str
    options: str
    tile: str
    count: int
    projected_us: float
    floor_us: float
    registers: int
    spilled: int
    """Bytes of local memory of a thread."""
    shared: int
    programs: int
    """That a processor holds at a time, and what keeps it from more."""
    limit: str
    in_flight: int
    """Bytes that all of them have asked for, at the most."""
    waves: float
    last_wave: float
    loop: dict[str, int]
    """How many instructions of each kind the main loop has; empty where there is no loop."""
    slow: int
    slow_outside: int
    """Those that take four times as long, or more, in the main loop and outside."""
    issue: float
    tensor: float
    """Cycles that one round of one program's main loop takes to issue, and on the tensor cores."""
    issue_us: float
    """Of all instructions, loops and the rest, if every scheduler issued one a cycle."""
    narrow: dict[str, int]
    narrow_outside: dict[str, int]
    """Accesses to global memory of fewer than 16 bytes a thread, in the main loop and outside."""

    @property
    def beyond_us(self) -> float:
        return self.projected_us - self.floor_us

    @property
    def shape(self) -> Shape:
        return Shape(self.kernel, self.sizes, self.options, self.tile)


class Alike(NamedTuple):
    """The launches of one kernel that differ in nothing that the table tells."""

    shape: Shape
    job: Job
    grid: tuple[int, ...]
    entry: Launch
    times: int


class Step(NamedTuple):
    """A step's kernels, and what is not ours to compile."""

    kernels: dict[Any, Alike]
    others: list[Launch]
    """The vendor's convolutions, a copy here and there."""


def step_of(
    model: torch.nn.Module, shape: Sequence[int], dtype: torch.dtype, target: Target, training: bool
) -> tuple[Step, list[Job]]:
    """The launches of a step, counted as ``explain`` counts them, and the distinct kernels among them."""
    jobs, step = Jobs(), Step({}, [])

    def collect(found: Rehearsed) -> None:
        job, shape = jobs.collect(found), shape_of(found)
        key = (shape, id(job), found.grid, found.entry.bytes)
        count = step.kernels[key].times if key in step.kernels else 0
        step.kernels[key] = Alike(shape, job, found.grid, found.entry, count + 1)

    with assume(assumption_of(model, target)):
        shares = rehearse(model, [image_like(shape, dtype)], dtype, training, collect)
    ours = {alike.entry.kernel for alike in step.kernels.values()}
    step.others.extend(entry for share in shares.values() for entry in share.launches if entry.kernel not in ours)
    return step, jobs.distinct


def shape_of(found: Rehearsed) -> Shape:
    given = found.arguments
    sizes = [f"{name}={given[name]}" for name in SIZES if name in given]
    if given.get("R", 1) * given.get("S", 1) > 1 or given.get("STRIDE_H", 1) > 1:
        sizes.append(f"{given.get('R', 1)}x{given.get('S', 1)}/{given.get('STRIDE_H', given.get('stride_h', 1))}")
    flags = [name.lower() for name, value in given.items() if value is True and not name.startswith("EVEN_")]
    blocks = "x".join(str(value) for name, value in given.items() if name.startswith("BLOCK_"))
    options = found.options
    cap = f" cap {options['maxnreg']}" if "maxnreg" in options else ""
    tile = f"{blocks} {options['num_warps']}w {options.get('num_stages', 1)}s{cap}"
    return Shape(found.kernel.fn.__name__, " ".join(sizes), " ".join(flags), tile)


def read(job: Job) -> tuple[Code, int, int, int]:
    """A kernel's machine code, registers, local and shared memory. It is compiled, or comes from Triton's cache."""
    compiled = job.compile()
    cubin = compiled.asm["cubin"]
    registers, local = resources(cubin)
    return parsed(disassembled(cubin), job.options["num_warps"]), registers, local, compiled.metadata.shared


def row_of(alike: Alike, made: tuple[Code, int, int, int], target: Target) -> Row:
    shape, _, grid, entry, count = alike
    code, registers, local, shared = made
    body, programs = code.loop or code.whole, math.prod(grid)
    held = occupancy(registers, shared, body.warps, target.sm)
    together = min(held.programs, -(-programs // target.sm_count))
    ran = waves(programs, held.programs, target.sm_count)
    in_flight = shared if code.uses_descriptors else body.in_flight
    cycles = issue_cycles(code, programs, entry)
    return Row(
        *shape,
        count,
        count * launch_us(entry, target),
        count * 1e6 * floor_seconds([entry], target),
        registers,
        local,
        shared,
        held.programs,
        held.limit if together == held.programs else "the grid",
        together * in_flight,
        *ran,
        dict(code.loop.mix) if code.loop else {},
        code.loop.slow if code.loop else 0,
        code.outside.slow,
        body.issue_cycles,
        body.flop / FLOP_PER_CYCLE[target.sm],
        count * 1e6 * cycles / (target.sm_count * CLOCK[target.sm]),
        dict(code.loop.narrow) if code.loop else {},
        dict(code.outside.narrow),
    )


def issue_cycles(code: Code, programs: int, entry: Launch) -> float:
    """Of all programs: the rest of each once, and the main loop as often as the launch's FLOPs (or bytes) ask for."""
    if code.loop is None:
        return programs * code.whole.issue_cycles
    done = code.loop.flop or code.loop.moved() or 1
    rounds = (entry.flops if code.loop.flop else entry.bytes) / done
    return programs * code.outside.issue_cycles + rounds * code.loop.issue_cycles


def rows_of(step: Step, jobs: Sequence[Job], target: Target, workers: int | None = None) -> list[Row]:
    """Compiled and read, what should lose the most time first. From here on this process compiles for ``target``."""
    compile_all(jobs, target.sm, workers)
    become_compiler(target.sm)
    made = {id(job): read(job) for job in jobs}
    found = [row_of(alike, made[id(alike.job)], target) for alike in step.kernels.values()]
    return sorted(found, key=lambda row: -row.beyond_us)
