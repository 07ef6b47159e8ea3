"""The machine that runs PTX, on code written by hand: its arithmetic, its branches, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .arithmetic import compare, operation
from .machine import Machine
from .matrices import described, product, swizzled
from .memory import Fault, Global
from .parse import parse

pytestmark = pytest.mark.quick

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 64
{
  .reg .pred %p<9>;
  .reg .b32 %r<99>;
  .reg .b64 %rd<99>;
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b32 %r1, [kernel_param_1];
  mov.u32 %r2, %tid.x;
  mad.wide.u32 %rd2, %r2, 4, %rd1;
"""


def run(body: str, out: torch.Tensor, number: int = 0, programs: int = 1) -> torch.Tensor:
    """Executes ``body``, which finds its element's address in %rd2, a number in %r1, and the thread in %r2."""
    kernel = parse(HEADER + body + "\n  ret;\n}\n")
    values = {"kernel_param_0": out.data_ptr(), "kernel_param_1": number}
    grid = np.array([[i, 0, 0] for i in range(programs)])
    with np.errstate(all="ignore"):
        Machine(kernel, values, Global([out]), grid, (programs, 1, 1), 4096, []).run()
    return out


def bits(*values: float, kind: type = np.float32) -> np.ndarray:
    return np.array(values, kind).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[np.dtype(kind).itemsize])


def computed(opcode: str, *operands: np.ndarray) -> list[float]:
    function = operation(tuple(opcode.split(".")))
    assert function is not None
    with np.errstate(all="ignore"):
        found = np.asarray(function(*operands))
    kinds = {"f32": np.float32, "f64": np.float64, "s32": np.int32, "s64": np.int64}
    kind = None if opcode.startswith("cvt") else kinds.get(opcode.split(".")[-1])
    return (
        list(found.view(kind)) if kind is not None and found.dtype.itemsize == np.dtype(kind).itemsize else list(found)
    )


def test_threads_part_and_meet_again():
    """A loop that every thread leaves at its own time, and a branch around a store."""
    body = """
      mov.b32 %r3, 0;
    $again:
      setp.ge.s32 %p1, %r3, %r2;
      @%p1 bra $done;
      add.s32 %r3, %r3, 1;
      bra.uni $again;
    $done:
      and.b32 %r4, %r2, 1;
      setp.eq.s32 %p2, %r4, 0;
      @%p2 bra $even;
      neg.s32 %r3, %r3;
    $even:
      st.global.b32 [%rd2], %r3;
    """
    found = run(body, torch.zeros(64, dtype=torch.int32))
    assert found.tolist() == [i if i % 2 == 0 else -i for i in range(64)]


def test_threads_that_returned_do_no_more():
    body = "setp.gt.u32 %p1, %r2, 9;\n @%p1 ret;\n st.global.b32 [%rd2], %r1;"
    assert run(body, torch.zeros(64, dtype=torch.int32), 7).tolist() == [7] * 10 + [0] * 54


def test_every_program_has_shared_memory_of_its_own():
    body = """
      mov.u32 %r3, %ctaid.x;
      mov.b32 %r4, global_smem;
      mad.lo.s32 %r5, %r2, 4, %r4;
      st.shared.b32 [%r5], %r3;
      bar.sync 0;
      xor.b32 %r6, %r2, 63;
      mad.lo.s32 %r7, %r6, 4, %r4;
      ld.shared.b32 %r8, [%r7];
      shl.b32 %r9, %r3, 6;
      add.s32 %r9, %r9, %r2;
      mad.wide.u32 %rd3, %r9, 4, %rd1;
      st.global.b32 [%rd3], %r8;
    """
    found = run(body, torch.zeros(3, 64, dtype=torch.int32), programs=3)
    assert found.tolist() == [[i] * 64 for i in range(3)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("add.s64 %rd2, %rd2, 4;\n st.global.b32 [%rd2], %r1;", "0 bytes beyond a tensor of 256 bytes"),
        ("add.s64 %rd2, %rd1, -4;\n ld.global.b32 %r3, [%rd2];", "illegal address"),
        (
            "add.s64 %rd3, %rd1, 4;\n ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd3];",
            "misaligned address for an access of 16 bytes",
        ),
        ("mov.b32 %r3, 99999;\n ld.shared.b32 %r4, [%r3];", "illegal shared address"),
        ("mov.b32 %r3, global_smem;\n mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 16;", "no barrier there"),
    ],
    ids=["beyond the end", "before the start", "misaligned", "shared", "barrier"],
)
def test_what_a_gpu_would_refuse(body, says):
    with pytest.raises(Fault, match=says):
        run(body, torch.zeros(64, dtype=torch.int32))


def test_an_access_under_a_false_predicate_is_none():
    body = """
      setp.eq.s32 %p1, %r1, 1;
      mov.b64 %rd3, 0;
      mov.b32 %r3, 7;
      @%p1 ld.global.b32 %r3, [%rd3];
      st.global.b32 [%rd2], %r3;
    """
    assert run(body, torch.zeros(64, dtype=torch.int32)).tolist() == [7] * 64


def test_waiting_for_what_never_comes():
    body = """
      mov.b32 %r3, global_smem;
      setp.eq.s32 %p1, %r2, 0;
      @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    {
      .reg .pred complete;
      waitLoop:
      mbarrier.try_wait.parity.shared.b64 complete, [%r3], 0;
      @!complete bra.uni waitLoop;
    }
    """
    with pytest.raises(Fault, match="wait for ever"):
        run(body, torch.zeros(64))


@pytest.mark.parametrize("waits", [True, False])
def test_asynchronous_copies_arrive_when_waited_for(waits):
    """Shared memory is NaN before: who reads too early sees that."""
    body = f"""
      mov.b32 %r3, global_smem;
      mad.lo.s32 %r4, %r2, 4, %r3;
      cp.async.ca.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x4, 4;
      cp.async.commit_group;
      cp.async.wait_group {0 if waits else 1};
      bar.sync 0;
      ld.shared.b32 %r5, [%r4];
      st.global.b32 [%rd2], %r5;
    """
    found = run(body, torch.arange(64, dtype=torch.float32))
    assert torch.equal(found, torch.arange(64.0)) if waits else found.isnan().all()


def test_lanes_exchange_registers():
    body = "shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;\n st.global.b32 [%rd2], %r3;"
    assert run(body, torch.zeros(64, dtype=torch.int32)).tolist() == [i ^ 16 for i in range(64)]
    body = "shfl.sync.up.b32 %r3, %r2, 1, 0, -1;\n st.global.b32 [%rd2], %r3;"
    assert run(body, torch.zeros(64, dtype=torch.int32)).tolist() == [i - (i % 32 > 0) for i in range(64)]


def test_arithmetic():
    word = np.array
    assert computed("fma.rn.f32", bits(1 + 2**-23), bits(1 + 2**-23), bits(-1 - 2**-22)) == [2**-46]  # rounded once
    assert computed("div.s32", word([-7], np.int32).view(np.uint32), word([2], np.uint32)) == [-3]
    assert computed("rem.s32", word([-7], np.int32).view(np.uint32), word([2], np.uint32)) == [-1]
    assert computed("shl.b32", word([1, 1], np.uint32), word([31, 32], np.uint32)) == [1 << 31, 0]
    assert computed("shr.s32", word([-8, -8], np.int32).view(np.uint32), word([1, 40], np.uint32)) == [-4, -1]
    assert computed("bfe.u32", word([0xABCD], np.uint32), word([4], np.uint32), word([8], np.uint32)) == [0xBC]
    assert computed(
        "prmt.b32", word([0x33221100], np.uint32), word([0x77665544], np.uint32), word([0x7531], np.uint32)
    ) == [0x77553311]
    assert computed("mul.wide.s32", word([-2], np.int32).view(np.uint32), word([3], np.uint32))[0] == 2**64 - 6
    assert computed("mul.hi.u32", word([1 << 31], np.uint32), word([6], np.uint32)) == [3]
    assert computed("mul.bf16x2", word([0x40003F80], np.uint32), word([0x40004000], np.uint32)) == [0x40804000]
    assert computed("popc.b32", word([0xF0F0], np.uint32)) == [8]
    assert computed("max.f32", bits(np.nan), bits(1.0)) == [1.0]
    assert np.isnan(computed("max.NaN.f32", bits(np.nan), bits(1.0)))[0]


def test_conversions():
    assert computed("cvt.rn.bf16.f32", bits(1 + 2**-8, 1 + 3 * 2**-8, np.nan)) == [0x3F80, 0x3F82, 0x7FFF]
    assert computed("cvt.rn.bf16x2.f32", bits(2.0), bits(1.0)) == [0x40003F80]  # the first operand is the upper half
    assert computed("cvt.rzi.s32.f32", bits(-1.9, 1e20)) == [0xFFFFFFFF, 0x7FFFFFFF]
    assert computed("cvt.s64.s32", np.array([-1], np.int32).view(np.uint32)) == [2**64 - 1]
    assert computed("cvt.u64.u32", np.array([-1], np.int32).view(np.uint32)) == [2**32 - 1]
    torch_bits = torch.randn(1000).double()
    ours = computed("cvt.rn.f16.f32", bits(*torch_bits.tolist()))
    assert ours == list(torch_bits.float().half().numpy().view(np.uint16))


def test_comparisons_with_nan():
    nan, one = bits(np.nan), bits(1.0)
    ordered = {name: bool(compare(name, "f32")(nan, one)[0]) for name in ("eq", "ne", "lt", "ge", "nan", "num")}
    assert ordered == {"eq": False, "ne": False, "lt": False, "ge": False, "nan": True, "num": False}
    assert all(compare(name, "f32")(nan, one)[0] for name in ("equ", "neu", "ltu", "geu"))


def test_tensor_cores_cut_off():
    """The sum's last bits are dropped, not rounded: of 1 + 1.5 ulp one ulp is left, on both sides of zero."""
    ulp = 2.0**-23
    for sign in (1, -1):
        acc = np.full((1, 1), sign, np.float32)
        found = product(acc, np.full((1, 1), sign * 1.5 * ulp, np.float32), np.ones((1, 1), np.float32))
        assert found[0, 0] == np.float32(sign * (1 + ulp))
    with np.errstate(over="ignore"):
        assert np.isinf(product(np.zeros((1, 1), np.float32), np.full((1, 1), 3e38), np.full((1, 1), 2.0)))[0, 0]


def test_descriptors_of_shared_memory():
    """A pattern of 128 bytes moves units of sixteen within eight rows; the rows themselves stay where they are."""
    flat = np.arange(0, 1024, 16)
    assert sorted(swizzled(flat, 128)) == list(flat) and (swizzled(flat, 128) // 128 == flat // 128).all()
    assert (swizzled(flat, 16) == flat).all()
    stride = 1024 >> 4
    places = described((1 << 62) | (stride << 32) | (2048 >> 4), 16, 16, 2, contiguous_rows=False)
    assert places[0, 0] == 2048 and places[8, 0] == 2048 + 1024 and places[1, 0] == 2048 + 128 + 16
    assert len(np.unique(places)) == places.size
