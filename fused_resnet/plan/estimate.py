"""How long a pass of a convolution should take with a configuration: what chooses where nobody measured.

Four things take time at once, and the slower ones show: memory's bytes, the operands' way from the second-level cache
into the tiles (re-reads included), the products of whole tiles (padding included), and what each wave of programs
waits, at its start and at every step of its reduction. The squares add up, since none hides behind another completely:

    t^2 = (memory)^2 + (near * loads)^2 + (matrix * products)^2 + (start * waves + step * steps)^2

Memory, loads and products are in microseconds at the target's sustained rates; :data:`RATES` are how far from these
the kernels stay. ``python -m benchmarks.fit`` fits them to the records of an H100, the only GPU with any: elsewhere
they are scaled by the target's rates and processors, and were compared with nothing. Of the forms that read by tensor
descriptors there is no record yet, and no estimate: they are measured in the order of their lists, and nothing chooses
one that was not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .config import GemmConfig
from .problem import ConvProblem
from .split import ELEMENT_BYTES
from .target import Target

REGISTERS = 65_536
THREADS = 2048
BESIDES = 70
"""Registers of a thread that are not accumulators."""
RESERVED = 1024
"""Bytes of shared memory that every program takes beside what it asks for."""
MEMORY = 1.2
"""A pass's time over that of a copy of as many bytes, where memory is all that it waits for."""
TAIL = 0.7
"""How much of an unfinished wave's time is lost: programs of one wave do not end together."""


class Terms(NamedTuple):
    """What a pass does, in microseconds at the target's rates, in waves, and in steps of a program in all waves."""

    memory: float
    loads: float
    products: float
    waves: float
    steps: float
    transposed: bool
    wide: bool
    """Eight warps: two groups wait for each other."""
    alone: bool
    """One program on a processor: nothing runs beside its epilogue."""


class Rates(NamedTuple):
    """What the terms of one kind of pass cost: factors, and microseconds for ``start`` and ``step``."""

    near: float
    matrix: float
    start: float
    step: float
    transposed: float = 1.0
    wide: float = 1.0
    alone: float = 1.0


RATES = {
    "fprop": Rates(near=0.256, matrix=1.5, start=2.28, step=0.109, transposed=0.86, alone=1.1),
    "dgrad": Rates(near=0.283, matrix=1.11, start=2.05, step=0.308, wide=1.1),
    "wgrad": Rates(near=0.139, matrix=0.878, start=13.5, step=0.252),
}


def estimate_us(problem: ConvProblem, kind: str, target: Target, config: GemmConfig, *, formed: bool = False) -> float:
    """Microseconds of ``kind`` ("fprop", "dgrad", "wgrad") by pointers. ``formed``: dy is not formed on load."""
    return together_us(terms(problem, kind, target, config, formed=formed), RATES[kind])


def floor_us(problem: ConvProblem, kind: str, target: Target) -> float:
    """The least time of a pass, or of a "pair": tensors once at the bandwidth, or products at the matrix rate."""
    p, itemsize = problem, ELEMENT_BYTES.get(problem.dtype, 2)
    x, y = (p.M if p.is_pointwise else p.N * p.H * p.W) * p.Ci, p.M * p.Co
    on_load = kind != "fprop" and p.is_pointwise
    paired = kind == "pair"
    moved = x + y * (1 + on_load) + x * (kind == "dgrad") + 2 * x * paired + p.Co * p.Ci // p.groups * p.taps
    return max(moved * itemsize / target.bandwidth, p.flops * (1 + paired) / target.matrix_rate) * 1e6


def gain_us(problem: ConvProblem, kind: str, target: Target, config: GemmConfig) -> float:
    """What measuring a pass that would take ``config`` may gain, at the most."""
    return max(0.0, estimate_us(problem, kind, target, config) - floor_us(problem, kind, target))


def together_us(t: Terms, rates: Rates) -> float:
    """The terms together, in their own unit. Takes arrays, too."""
    waiting = rates.start * t.waves + rates.step * t.steps
    squares = (MEMORY * t.memory) ** 2 + (rates.near * t.loads) ** 2 + (rates.matrix * t.products) ** 2 + waiting**2
    return squares**0.5 * rates.transposed**t.transposed * rates.wide**t.wide * rates.alone**t.alone


def terms(problem: ConvProblem, kind: str, target: Target, config: GemmConfig, *, formed: bool = False) -> Terms:
    """``config``'s on ``target``; with ``formed`` a gradient's dy is read as it is."""
    p, itemsize = problem, ELEMENT_BYTES.get(problem.dtype, 2)
    on_load = kind != "fprop" and p.is_pointwise and not formed
    x, y = (p.M if p.is_pointwise else p.N * p.H * p.W) * p.Ci, p.M * p.Co
    weight, parts = p.Co * p.Ci * p.taps, 0
    if kind == "wgrad":
        grid = _tiles(p.Co, config.block_m) * _tiles(p.Ci, config.block_n) * (p.taps // config.row_taps) * config.split
        steps = _tiles(_tiles(p.M, config.block_k), config.split)
        left, right = config.block_m * (1 + on_load), config.block_n * config.row_taps
        tile = config.block_m * config.block_n * config.row_taps
        parts = 2 * 4 * weight * config.split * (config.split > 1)
        moved = x + y * (1 + on_load)
    else:
        rows, columns, depth = (p.M, p.Co, p.Ci) if kind == "fprop" else (p.N * p.H * p.W, p.Ci, p.Co)
        if kind == "dgrad" and p.is_pointwise:
            rows = p.M  # the pixels that were sampled
        taps = p.taps if kind == "fprop" else max(1, p.taps // (p.stride[0] * p.stride[1]))
        grid = _tiles(rows, config.block_m) * _tiles(columns, config.block_n)
        steps = taps * _tiles(depth, config.block_k)
        left, right = config.block_m * (1 + on_load), config.block_n
        tile = config.block_m * config.block_n
        moved = x + y if kind == "fprop" else 2 * x + y * (1 + on_load)  # dx, and what masks it or joins it

    together = programs(config, tile, left + right, itemsize, target)
    waves = grid / (target.sm_count * together)
    lasting = TAIL * math.ceil(waves) + (1 - TAIL) * max(waves, 1.0)
    uneven = lasting / waves  # processors idle while the last wave ends
    loaded = grid * steps * config.block_k * (left + right) * itemsize
    return Terms(
        memory=((moved + weight) * itemsize + parts) / target.bandwidth * 1e6,
        loads=uneven * loaded / target.bandwidth * 1e6,
        products=uneven * 2 * grid * steps * config.block_k * tile / target.matrix_rate * 1e6,
        waves=lasting,
        steps=lasting * steps,
        transposed=config.transposed,
        wide=config.num_warps == 8,
        alone=together == 1,
    )


def programs(config: GemmConfig, tile: int, staged: int, itemsize: int, target: Target) -> int:
    """How many share a processor: ``tile`` accumulators, ``staged`` rows of ``block_k`` elements in each stage."""
    threads = 32 * config.num_warps
    registers = min(config.maxnreg or 255, tile // threads + BESIDES)
    shared = itemsize * config.num_stages * config.block_k * staged + RESERVED
    return max(
        1, min(REGISTERS // (registers * threads), (target.shared_memory + RESERVED) // shared, THREADS // threads)
    )


def _tiles(size: int, block: int) -> int:
    return -(-size // block)
