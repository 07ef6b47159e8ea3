"""Counts of wavefronts and sectors where they are known: code written by hand, one access of each kind."""

from __future__ import annotations

import pytest
import torch

from .test_machine import run
from .traffic import Traffic, counted

pytestmark = pytest.mark.quick

WARPS = 2
AT = """
  mov.b32 %r4, global_smem;
  and.b32 %r9, %r2, 31;
"""


def counts(body: str, memory: str, number: int = 0, programs: int = 1) -> tuple[float, float]:
    """Taken and fewest by a warp, of the only instruction that touches ``memory``."""
    with counted() as traffic:
        run(AT + body, torch.zeros(4096, dtype=torch.int32), number, programs)
    found = traffic.total(memory)
    assert found.warps == WARPS * programs
    return found.taken / found.warps, found.fewest / found.warps


@pytest.mark.parametrize("opcode", ["ld", "st"])
@pytest.mark.parametrize(
    ("stride", "kind", "expected"),
    [
        (4, "b32", (1, 1)),
        (0, "b32", (1, 1)),  # one word for all
        (8, "b32", (2, 1)),
        (12, "b32", (1, 1)),
        (32, "b32", (8, 1)),
        (128, "b32", (32, 1)),
        (132, "b32", (1, 1)),
        (2, "b16", (1, 1)),  # two of them in a word
        (64, "b16", (16, 1)),
        (1, "b8", (1, 1)),
        (8, "b64", (2, 2)),
        (16, "b64", (4, 2)),
        (72, "b64", (2, 2)),
        (16, "v2.b32", (4, 2)),
        (16, "v4.b32", (4, 4)),
        (0, "v4.b32", (4, 4)),
        (32, "v4.b32", (8, 4)),
        (128, "v4.b32", (32, 4)),
        (48, "v4.b32", (4, 4)),
    ],
)
def test_banks(opcode: str, stride: int, kind: str, expected: tuple[int, int]) -> None:
    each = int(kind[1]) if kind[0] == "v" else 1
    values = "{" + ", ".join(["%r5", "%r6", "%r7", "%r8"][:each]) + "}" if each > 1 else "%r5"
    if kind == "b64":
        values = "%rd5"
    address = f"mad.lo.s32 %r3, %r9, {stride}, %r4;\n"
    operands = f"{values}, [%r3]" if opcode == "ld" else f"[%r3], {values}"
    assert counts(f"{address} {opcode}.shared.{kind} {operands};", "shared") == expected


def test_a_warp_alone_conflicts_with_itself() -> None:
    """The second warp reads the same banks; that is another access. And so is the second program's."""
    body = "mad.lo.s32 %r3, %r2, 4, %r4;\n ld.shared.b32 %r5, [%r3];"
    assert counts(body, "shared", programs=3) == (1, 1)


def test_threads_that_ask_for_nothing() -> None:
    """Every second thread: two wavefronts become one. All threads of half a warp: half of a vector's four."""
    some = "and.b32 %r5, %r9, 1;\n setp.eq.s32 %p1, %r5, 0;\n"
    assert counts(some + "mad.lo.s32 %r3, %r9, 64, %r4;\n @%p1 ld.shared.b32 %r5, [%r3];", "shared") == (16, 1)
    some = "setp.lt.u32 %p1, %r9, 16;\n"
    body = "mad.lo.s32 %r3, %r9, 16, %r4;\n @%p1 ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3];"
    assert counts(some + body, "shared") == (2, 2)


@pytest.mark.parametrize(("matrices", "values"), [(1, "{%r5}"), (2, "{%r5, %r6}"), (4, "{%r5, %r6, %r7, %r8}")])
@pytest.mark.parametrize(("stride", "conflicts"), [(16, 1), (64, 4), (128, 8), (48, 1)])
@pytest.mark.parametrize("opcode", ["ldmatrix", "stmatrix"])
def test_rows_of_matrices(opcode: str, stride: int, conflicts: int, matrices: int, values: str) -> None:
    address = f"mad.lo.s32 %r3, %r9, {stride}, %r4;\n"
    operands = f"{values}, [%r3]" if opcode == "ldmatrix" else f"[%r3], {values}"
    body = f"{address} {opcode}.sync.aligned.m8n8.x{matrices}.shared.b16 {operands};"
    assert counts(body, "shared") == (conflicts * matrices, matrices)


@pytest.mark.parametrize("opcode", ["ld", "st"])
@pytest.mark.parametrize(
    ("stride", "kind", "expected"),
    [
        (4, "b32", (4, 4)),
        (0, "b32", (1, 1)),
        (8, "b32", (8, 4)),
        (32, "b32", (32, 4)),
        (2, "b16", (2, 2)),
        (1, "b8", (1, 1)),
        (16, "v4.b32", (16, 16)),
        (32, "v4.b32", (32, 16)),
    ],
)
def test_sectors(opcode: str, stride: int, kind: str, expected: tuple[int, int]) -> None:
    values = "{%r5, %r6, %r7, %r8}" if kind[0] == "v" else "%r5"
    address = f"mad.wide.u32 %rd3, %r9, {stride}, %rd1;\n"
    operands = f"{values}, [%rd3]" if opcode == "ld" else f"[%rd3], {values}"
    assert counts(f"{address} {opcode}.global.{kind} {operands};", "global") == expected


def test_copies_count_on_both_sides() -> None:
    """Where a copy's source has no bytes, zeros go to shared memory all the same."""
    body = """
      mad.lo.s32 %r3, %r9, 128, %r4;
      mad.wide.u32 %rd3, %r9, 16, %rd1;
      setp.lt.u32 %p1, %r9, 8;
      selp.b32 %r5, 16, 0, %p1;
      cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, %r5;
      cp.async.wait_all;
    """
    assert counts(body, "shared") == (32, 4)
    assert counts(body, "global") == (4, 4)


def test_nobody_counts_outside() -> None:
    body = "mad.lo.s32 %r3, %r2, 4, %r4;\n ld.shared.b32 %r5, [%r3];"
    with counted() as traffic:
        pass
    run(AT + body, torch.zeros(64, dtype=torch.int32))
    assert traffic == Traffic()
