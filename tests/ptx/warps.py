"""What the threads of a warp do together: exchanges, matrices and their products, barriers and boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import matrices
from .bits import Array, number
from .memory import Fault
from .parse import listed

if TYPE_CHECKING:
    from .machine import Machine, Mask, Parts, Step

PATIENCE = 10_000
"""Rounds that threads wait for a barrier before they are taken to wait for ever."""


def _rows(value: Array) -> Array:
    """A register by warps."""
    return value.reshape(-1, 32)


def shuffle(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    predicate = None
    if operands[1] == "|":
        predicate, operands = operands[2], (operands[0], *operands[3:])
    mode = opcode[2]
    read, count, clamp = (machine.source(operand, 32) for operand in operands[1:4])

    def step(mask: Mask) -> None:
        lane = matrices.LANE
        by, bound = (_rows(operand()).astype(np.int64) for operand in (count, clamp))
        segment = bound >> 8 & 31
        highest = (lane & segment) | (bound & 31 & ~segment)
        by = by & 31
        if mode == "bfly":
            other = lane ^ by
        elif mode == "idx":
            other = (lane & segment) | (by & ~segment)
        else:
            other = lane - by if mode == "up" else lane + by
        inside = other >= highest if mode == "up" else other <= highest
        other = np.where(inside, other, lane)
        value = np.take_along_axis(_rows(read()), other, 1).reshape(-1)
        machine.write(operands[0], value, mask)
        if predicate is not None:
            machine.write(predicate, inside.reshape(-1), mask)

    return step


def elect(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    def step(mask: Mask) -> None:
        active = _rows(np.ones(machine.lanes, bool) if mask is None else mask)
        first = np.argmax(active, 1)[:, None]
        machine.write(operands[0], np.repeat(first.astype(np.uint32), 32, 1).reshape(-1), mask)
        machine.write(operands[2], ((first == matrices.LANE) & active).reshape(-1), mask)

    return step


def load_matrix(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    targets, read = listed(operands[0]), machine.address(operands[1], 32)

    def step(mask: Mask) -> None:
        warps = machine.together(mask, 32)
        for place, target in enumerate(targets):
            at = _matrix_rows(machine, read, warps, place)
            tile = machine.shared.raw.view(np.uint16)[at].reshape(-1, 8, 8)
            machine.give(target, matrices.load_matrices(tile, "trans" in opcode), warps, mask)

    return step


def _matrix_rows(machine: Machine, read: Callable[[], Array], warps: Array, place: int) -> Array:
    """Where the 16-bit elements [8 rows of each warp, 8] are whose addresses eight of its threads hold."""
    eight = slice(8 * place, 8 * place + 8)
    lanes = machine.by(32, np.arange(machine.lanes), warps)[:, eight].reshape(-1)
    first = machine.shared.offsets(lanes, read()[lanes], 16)
    return first[:, None] // 2 + np.arange(8)


def store_matrix(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    read = machine.address(operands[0], 32)
    sources = [machine.source(source, 32) for source in listed(operands[1])]

    def step(mask: Mask) -> None:
        warps = machine.together(mask, 32)
        for place, source in enumerate(sources):
            tile = matrices.store_matrices(machine.by(32, source(), warps), "trans" in opcode)
            machine.shared.raw.view(np.uint16)[_matrix_rows(machine, read, warps, place)] = tile.reshape(-1, 8)

    return step


def multiply(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    kind = opcode[-2]
    if kind not in ("bf16", "f16", "tf32", "f64"):
        raise NotImplementedError(".".join(opcode))
    groups = [
        [machine.source(part, 64 if kind == "f64" else 32) for part in listed(operand)] for operand in operands[1:4]
    ]
    targets = listed(operands[0])

    def step(mask: Mask) -> None:
        warps = machine.together(mask, 32)
        a, b, c = ([machine.by(32, read(), warps) for read in group] for group in groups)
        if kind == "f64":
            found = matrices.small_product(a[0], b[0], c)
        else:
            product = matrices.product(matrices.accumulators(c), matrices.left(a, kind), matrices.right(b, kind))
            found = matrices.to_registers(product)
        for target, value in zip(targets, found, strict=True):
            machine.give(target, value, warps, mask)

    return step


def multiply_group(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    """wgmma: 64 rows by the four warps of a group, operands in shared memory, or the left one in registers."""
    kind, n = opcode[-1], int(opcode[4].split("n")[1].split("k")[0])
    depth, itemsize = (8, 4) if kind == "tf32" else (16, 2)
    accs, keep = listed(operands[0]), machine.source(operands[3], 1)
    from_registers = operands[1].startswith("{")
    parts = [machine.source(part, 32) for part in listed(operands[1])] if from_registers else []
    left = None if from_registers else machine.source(operands[1], 64)
    right = machine.source(operands[2], 64)
    flags = [int(flag) for flag in operands[4:]]
    if flags[:2] != [1, 1]:
        raise NotImplementedError("a negated operand")
    across = flags[2:] if not from_registers else [0, *flags[2:]]
    across += [0] * (2 - len(across))

    def matrix(read: Callable[[], Array], warps: Array, rows: int, by_rows: bool) -> Array:
        found = []
        for lane in machine.by(128, np.arange(machine.lanes), warps)[:, 0]:
            place = matrices.described(int(read()[lane]), rows, depth, itemsize, by_rows)
            offsets = machine.shared.offsets(np.full(place.size, lane), place.reshape(-1), itemsize)
            found.append(matrices.gathered(machine.shared.raw, offsets.reshape(place.shape), itemsize))
        return matrices.numbers(np.stack(found), kind)

    def step(mask: Mask) -> None:
        groups = machine.together(mask, 128)
        if left is None:
            held = [machine.by(128, part(), groups).reshape(-1, 4, 32) for part in parts]
            tile_a = matrices.left(held, kind).reshape(-1, 64, depth)
        else:
            tile_a = matrix(left, groups, 64, bool(across[0]))
        tile_b = np.swapaxes(matrix(right, groups, n, bool(across[1])), -1, -2)
        kept = machine.by(128, keep(), groups)[:, 0]
        values = [machine.by(128, machine.register(name, 32), groups).reshape(-1, 4, 32) for name in accs]
        acc = matrices.accumulators(values).reshape(-1, 64, n)
        tile = matrices.product(np.where(kept[:, None, None], acc, np.float32(0)), tile_a, tile_b)
        for target, value in zip(accs, matrices.to_registers(tile.reshape(-1, 4, 16, n)), strict=True):
            machine.give(target, value.reshape(-1, 128), groups, mask)

    return step


def barrier(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    what = opcode[1]
    if what == "try_wait":
        read, parity = machine.address(operands[1], 32), machine.source(operands[2], 32)

        def wait(mask: Mask) -> None:
            done = np.zeros(machine.lanes, bool)
            for lane, program in machine.each(mask):
                done[lane] = machine.barriers.is_past(program, int(read()[lane]), int(parity()[lane]) & 1)
            machine.waited = 0 if done.all() else machine.waited + 1
            if machine.waited > PATIENCE:
                raise Fault("threads wait for ever")
            machine.write(operands[0], done, mask)

        return wait
    read = machine.address(operands[1] if what == "arrive" else operands[0], 32)
    count = int(operands[-1], 0) if operands[-1].lstrip("-").isdigit() else 0

    def step(mask: Mask) -> None:
        for lane, program in machine.each(mask):
            at = int(read()[lane])
            if what == "init":
                machine.barriers.start(program, at, count)
            elif what == "inval":
                machine.barriers.end(program, at)
            else:
                machine.barriers.arrive(program, at, count)

    return step


def box(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    loads = opcode[5].startswith("shared")
    boxed = operands[1] if loads else operands[0]
    where = machine.address(operands[0] if loads else operands[1], 32)
    name, _, corner = boxed.strip("[] ").partition(",")
    described = machine.source(name.strip(), 64)
    corners = [machine.source(part, 32) for part in listed(corner.strip())]
    barrier = machine.address(operands[2], 32) if loads else None

    def step(mask: Mask) -> None:
        for lane, program in machine.each(mask):
            tensor = machine.maps[int(described()[lane])]
            at = tuple(int(number(part(), "s32")[lane]) for part in corners)
            if barrier is None:
                tensor.store(machine.memory, machine.shared, lane, int(where()[lane]), at)
            else:
                tensor.load(machine.memory, machine.shared, lane, int(where()[lane]), at)
                machine.barriers.complete(program, int(barrier()[lane]), tensor.nbytes)

    return step


BUILDERS = {
    ("shfl",): shuffle,
    ("elect",): elect,
    ("ldmatrix",): load_matrix,
    ("stmatrix",): store_matrix,
    ("mma",): multiply,
    ("wgmma", "mma_async"): multiply_group,
    ("mbarrier",): barrier,
    ("cp", "async", "bulk", "tensor"): box,
}
"""By the first parts of the opcode."""
