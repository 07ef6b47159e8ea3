"""What each thread does by itself: arithmetic on registers, moves, loads, stores, and copies that arrive later."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import compare
from .bits import UNSIGNED, Array, fit, halves, size_of
from .memory import OWN
from .parse import address, listed, width

if TYPE_CHECKING:
    from .machine import Machine, Mask, Parts, Step


def plain(machine: Machine, opcode: Parts, operands: Parts, function: Callable[..., Array]) -> Step:
    size = size_of(opcode[-1])
    target, sources = operands[0], []
    for place, operand in enumerate(operands[1:]):
        counts = (opcode[0] in ("shl", "shr", "bfe") and place > 0) or (opcode[0] == "prmt")
        wide = "wide" in opcode and place == 2
        predicate = opcode[0] == "selp" and place == 2
        sources.append(machine.source(operand, 32 if counts else 2 * size if wide else 1 if predicate else size))
    held = width(target)

    def step(mask: Mask) -> None:
        value = function(*(source() for source in sources))
        machine.write(target, fit(value, held), mask)

    return step


def compare_registers(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    kind, targets = opcode[-1], [operands[0]]
    if operands[1] == "|":
        targets, operands = [operands[0], operands[2]], operands[2:]
    one = kind.removesuffix("x2")
    test = compare(opcode[1], one)
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = joins.get(opcode[2]) if len(opcode) > 3 else None
    a, b = (machine.source(operand, size_of(kind)) for operand in operands[1:3])
    other = machine.source(operands[3], 1) if join is not None else None

    def step(mask: Mask) -> None:
        pairs = zip(halves(a()), halves(b()), strict=True) if one != kind else ((a(), b()),)
        for target, (x, y) in zip(targets, pairs, strict=False):
            found = np.broadcast_to(test(x, y), (machine.lanes,))
            machine.write(target, join(found, other()) if join is not None and other is not None else found, mask)

    return step


def move(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    size, target, source = size_of(opcode[-1]), *operands
    if target.startswith("{"):
        parts, read = listed(target), machine.source(source, size)
        each = size // len(parts)

        def unpack(mask: Mask) -> None:
            value = read()
            for place, part in enumerate(parts):
                moved = value >> value.dtype.type(each * place)
                machine.write(part, moved.astype(UNSIGNED[each]), mask)

        return unpack
    if source.startswith("{"):
        reads = [machine.source(part, size // len(listed(source))) for part in listed(source)]
        each = size // len(reads)

        def pack(mask: Mask) -> None:
            value = np.zeros(machine.lanes, UNSIGNED[size])
            for place, read in enumerate(reads):
                value = value | (read().astype(UNSIGNED[size]) << UNSIGNED[size](each * place))
            machine.write(target, value, mask)

        return pack
    read = machine.source(source, size)
    return lambda mask: machine.write(target, fit(read(), size), mask)


def load_parameter(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    kind, (name, offset) = opcode[-1], address(operands[1])
    bits = machine.parameters[name] >> 8 * offset & ((1 << size_of(kind)) - 1)
    value = np.full(machine.lanes, UNSIGNED[size_of(kind)](bits))
    return lambda mask: machine.write(operands[0], fit(value, width(operands[0]), kind[0] == "s"), mask)


def parameter_address(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    read = machine.source(operands[1], 64)
    return lambda mask: machine.write(operands[0], read(), mask)


def load(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    kind, targets, where = opcode[-1], listed(operands[0]), opcode[1].partition("::")[0]
    size, read = size_of(kind) // 8, machine.address(operands[1], 32 if where == "shared" else 64)

    def step(mask: Mask) -> None:
        lanes = machine.picked(mask)
        addresses = read()[lanes]
        if where == "shared":
            values = machine.shared.read(lanes, addresses, size, len(targets))
        elif where != "global" and (addresses >= np.uint64(OWN)).all():
            values = machine.local.read(lanes, addresses, size, len(targets))
        else:
            values = machine.memory.read(addresses, size, len(targets))
        for place, target in enumerate(targets):
            value = np.zeros(machine.lanes, values.dtype)
            value[lanes] = values[:, place]
            machine.write(target, fit(value, width(target), kind[0] == "s"), mask)

    return step


def store(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    kind, where = opcode[-1], opcode[1].partition("::")[0]
    size, read = size_of(kind), machine.address(operands[0], 32 if where == "shared" else 64)
    sources = [machine.source(source, size) for source in listed(operands[1])]

    def step(mask: Mask) -> None:
        lanes = machine.picked(mask)
        addresses = read()[lanes]
        values = np.stack([source()[lanes].astype(UNSIGNED[size]) for source in sources], -1)
        if where == "shared":
            machine.shared.write(lanes, addresses, values)
        elif where != "global" and (addresses >= np.uint64(OWN)).all():
            machine.local.write(lanes, addresses, values)
        else:
            machine.memory.write(addresses, values)

    return step


def copy_async(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    to, source, count = machine.address(operands[0], 32), machine.address(operands[1], 64), int(operands[2], 0)
    present = machine.source(operands[3], 32) if len(operands) > 3 else None

    def step(mask: Mask) -> None:
        lanes = machine.picked(mask)
        values = np.zeros((len(lanes), count), np.uint8)
        given = np.full(len(lanes), count) if present is None else present()[lanes]
        for length in np.unique(given[given > 0]):
            some = given == length
            unit = int(length)
            found = machine.memory.read(source()[lanes[some]], min(unit, 8), unit // min(unit, 8))
            values[some, :unit] = np.ascontiguousarray(found).view(np.uint8)
        machine.shared.copy_later(lanes, to()[lanes], values)

    return step


def commit(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    return lambda mask: machine.shared.commit()


def wait(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    pending = int(operands[0]) if operands else 0

    def step(mask: Mask) -> None:
        if not operands:
            machine.shared.commit()
        machine.shared.wait(pending)

    return step


def nothing(machine: Machine, opcode: Parts, operands: Parts) -> Step:
    return lambda mask: None


BUILDERS = {
    ("setp",): compare_registers,
    ("mov",): move,
    ("ld", "param"): load_parameter,
    ("cvta",): parameter_address,
    ("ld",): load,
    ("st",): store,
    ("cp", "async", "commit_group"): commit,
    ("cp", "async", "wait_group"): wait,
    ("cp", "async", "wait_all"): wait,
    ("cp", "async", "bulk", "commit_group"): nothing,
    ("cp", "async", "bulk", "wait_group"): nothing,
    ("cp", "async", "ca"): copy_async,
    ("cp", "async", "cg"): copy_async,
}
"""By the first parts of the opcode; the first that fits."""
