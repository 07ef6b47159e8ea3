"""The strict interpreter refuses and rounds as a GPU would: small kernels that the plain one lets pass."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import INTERPRETED

if INTERPRETED:
    from tests import strict_interpreter

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not INTERPRETED, reason="the kernels here run compiled"),
]


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _first(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "cast":
        out = x
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "select":
        out = tl.where(x <= 0, 0.0, y)
    elif OP == "helper":
        out = _double(x)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "sum":
        out = tl.zeros((BLOCK,), x.dtype) + tl.sum(x, axis=0)
    elif OP == "max":
        out = tl.zeros((BLOCK,), x.dtype) + tl.max(x, axis=0)
    elif OP == "reduce":
        out = tl.zeros((BLOCK,), x.dtype) + tl.reduce(x, 0, _first)
    elif OP == "scan":
        out = tl.cumsum(x, axis=0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty))


def elementwise(op: str, x: torch.Tensor, y: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=out_dtype)
    elementwise_kernel[(1,)](x, y, out, OP=op, BLOCK=x.numel())
    return out


def pair(dtype: torch.dtype, n: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["add", "mul", "cast", "helper", "select"])
def test_16_bit_arithmetic_rounds_once(op, dtype):
    x, y = pair(dtype)
    expected = {"add": x + y, "mul": x * y, "cast": x, "helper": x + x, "select": torch.where(x <= 0, 0.0, y)}[op]
    assert torch.equal(elementwise(op, x, y, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(dtype):
    x = torch.cat([torch.randn(1018), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3e38])])
    out = elementwise("cast", x, x, dtype)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    # halfway between two bfloat16 values: to the even one, up and down
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-16])
    assert torch.equal(elementwise("cast", ties, ties, torch.bfloat16), ties.bfloat16())


def test_fma_rounds_once():
    x, y = pair(torch.float32)
    assert torch.equal(elementwise("fma", x, y, torch.float32), (x.double() * y.double() + x.double()).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_sum_loses_what_16_bit_adders_lose(dtype):
    """1024 values near 1: rounding at every step of the tree, so neither garbage nor as good as float32."""
    x = (1 + torch.rand(1024) / 8).to(dtype)
    out = elementwise("sum", x, x, torch.float32)[0].item()
    exact = x.double().sum().item()
    assert 1e-6 < abs(out / exact - 1) < 2**-6


def test_wide_sums_and_reductions_with_any_function():
    x, y = pair(torch.float32)
    torch.testing.assert_close(elementwise("sum", x, y, torch.float32)[0], x.sum(), rtol=1e-5, atol=1e-5)
    assert elementwise("reduce", x, y, torch.float32)[0] == x.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_and_min_drop_nan(dtype):
    x, y = (
        torch.tensor([math.nan, 1.0, math.nan, -3.0]).to(dtype),
        torch.tensor([2.0, math.nan, math.nan, 0.0]).to(dtype),
    )
    expected = torch.tensor([2.0, 1.0, math.nan, 0.0])
    torch.testing.assert_close(elementwise("maximum", x, y, torch.float32), expected, equal_nan=True)
    expected[3] = -3.0
    torch.testing.assert_close(elementwise("minimum", x, y, torch.float32), expected, equal_nan=True)
    assert elementwise("max", x, y, torch.float32)[0] == 1.0


def test_a_scan_of_bfloat16_runs_in_float32():
    x, y = pair(torch.bfloat16)
    expected = x.float().cumsum(0)
    torch.testing.assert_close(elementwise("scan", x, y, torch.float32), expected, rtol=1e-4, atol=1e-4)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :])
    b = tl.load(b_ptr + offs_k[:, None] * N + offs_n[None, :])
    acc = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty))


def dot(a: torch.Tensor, b: torch.Tensor, precision: str | None = None) -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[1])
    dot_kernel[(1,)](a, b, out, PRECISION=precision, M=a.shape[0], N=b.shape[1], K=a.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_dot_accumulates_in_float32(dtype):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    torch.testing.assert_close(dot(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_float32_dot_is_tf32_unless_told_otherwise():
    a, b = torch.randn(32, 64), torch.randn(64, 16)
    exact = a.double() @ b.double()

    def error(out: torch.Tensor) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    assert error(dot(a, b, "ieee")) < 1e-6
    assert 1e-4 < error(dot(a, b, "tf32")) < 1e-3
    assert torch.equal(dot(a, b), dot(a, b, "tf32"))


def test_a_dot_too_short_to_compile_is_refused():
    with pytest.raises(Exception, match="K >= 16"):
        dot(torch.randn(16, 8).half(), torch.randn(8, 16).half())


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, HAS_OTHER: tl.constexpr, MASKED_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    if HAS_OTHER:
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + offs, mask=mask)
    if MASKED_STORE:
        tl.store(out_ptr + offs, x, mask=mask)
    else:
        tl.store(out_ptr + offs, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8])
def test_masked_lanes_without_other_are_poison(dtype):
    x = torch.ones(12).to(dtype)
    out = torch.zeros(16).to(dtype)
    copy_kernel[(2,)](x, out, 12, HAS_OTHER=False, MASKED_STORE=False, BLOCK=8)
    assert torch.equal(out[:12], x)
    assert out[12:].isnan().all() if dtype.is_floating_point else (out[12:].abs() > 1).all()
    copy_kernel[(2,)](x, out, 12, HAS_OTHER=True, MASKED_STORE=False, BLOCK=8)
    assert (out[12:] == 0).all()


def test_accesses_stay_inside_the_argument_they_come_from():
    memory = torch.zeros(64)
    copy_kernel[(2,)](memory[16:28], memory[32:44], 12, HAS_OTHER=False, MASKED_STORE=True, BLOCK=8)
    with pytest.raises(Exception, match=r"store outside of an argument float32\[12\]: element 12 of 12"):
        copy_kernel[(2,)](memory[16:28], memory[32:44], 12, HAS_OTHER=False, MASKED_STORE=False, BLOCK=8)
    with pytest.raises(Exception, match=r"load outside of an argument float32\[12\]: element 12 of 12"):
        copy_kernel[(2,)](memory[16:28], memory[32:48], 16, HAS_OTHER=False, MASKED_STORE=True, BLOCK=8)


@triton.jit
def before_start_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs - 1))


def test_an_access_before_the_start_is_refused():
    memory = torch.zeros(32)
    with pytest.raises(Exception, match="element -1 of 8"):
        before_start_kernel[(1,)](memory[8:16], memory[16:24], BLOCK=8)


@triton.jit
def scatter_kernel(out_ptr, STEP: tl.constexpr, READ: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid * STEP, pid)
    if READ:
        tl.store(out_ptr + pid * STEP, tl.load(out_ptr))


def test_two_programs_that_meet_in_memory_are_refused():
    scatter_kernel[(4,)](out := torch.zeros(4, dtype=torch.int32), STEP=1, READ=False)
    assert out.tolist() == [0, 1, 2, 3]
    with pytest.raises(Exception, match=r"store .* another program wrote"):
        scatter_kernel[(4,)](out, STEP=0, READ=False)
    with pytest.raises(Exception, match=r"load .* another program wrote"):
        scatter_kernel[(4,)](out, STEP=1, READ=True)


@triton.jit
def atomic_kernel(out_ptr, value):
    tl.atomic_add(out_ptr, value)


def test_float_atomics_are_refused_and_integer_ones_run():
    atomic_kernel[(4,)](count := torch.zeros(1, dtype=torch.int32), 2)
    assert count.item() == 8
    with pytest.raises(Exception, match="atomics on floats"):
        atomic_kernel[(4,)](torch.zeros(1), 2.0)


@triton.jit
def offset_kernel(out_ptr, row, stride, OP: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    if OP == "mul":
        offset = row * stride
    elif OP == "add":
        offset = row + stride
    else:
        offset = row - stride
    tl.store(out_ptr, offset)


@pytest.mark.parametrize(
    ("op", "row", "stride", "expected"),
    [("mul", 65536, 65536, 2**32), ("add", 2**31 - 1, 7, 2**31 + 6), ("sub", -(2**31) + 1, 7, -(2**31) - 6)],
)
def test_int32_offsets_that_overflow_are_refused(op, row, stride, expected):
    out = torch.zeros(1, dtype=torch.int64)
    offset_kernel[(1,)](out, row, stride, OP=op, WIDE=True)
    assert out.item() == expected
    with pytest.raises(Exception, match="overflows"):
        offset_kernel[(1,)](out, row, stride, OP=op, WIDE=False)


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) > 0, "all positive")


def test_device_assert_is_honoured():
    assert_kernel[(1,)](torch.ones(4), BLOCK=4)
    with pytest.raises(Exception, match="all positive"):
        assert_kernel[(1,)](torch.tensor([1.0, 1.0, 0.0, 1.0]), BLOCK=4)


@triton.jit
def hint_kernel(out_ptr, start, DIVISOR: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK) * (tl.arange(0, BLOCK) < 8)
    offs = tl.max_contiguous(tl.multiple_of(offs, DIVISOR), RUN)
    tl.store(out_ptr + tl.arange(0, BLOCK), offs)


def test_hints_must_hold():
    out = torch.zeros(16, dtype=torch.int32)
    hint_kernel[(1,)](out, 32, DIVISOR=16, RUN=8, BLOCK=8)
    with pytest.raises(Exception, match=r"multiple_of\(16\)"):
        hint_kernel[(1,)](out, 8, DIVISOR=16, RUN=8, BLOCK=8)
    with pytest.raises(Exception, match=r"max_contiguous\(16\)"):
        hint_kernel[(1,)](out, 32, DIVISOR=16, RUN=16, BLOCK=16)


@triton.jit
def branch_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if x > 0:
        tl.store(out_ptr + tl.arange(0, BLOCK), x)


def test_a_tensor_has_no_truth_value():
    with pytest.raises(Exception, match="truth value"):
        branch_kernel[(1,)](torch.ones(4), torch.zeros(4), BLOCK=4)
    branch_kernel[(1,)](torch.ones(4), out := torch.zeros(4), BLOCK=1)
    assert out.tolist() == [1, 0, 0, 0]


@triton.jit
def bound_kernel(n_ptr, out_ptr):
    total = 0
    for i in range(tl.load(n_ptr)):
        total += i
    tl.store(out_ptr, total)


def test_a_loop_bound_may_be_a_tensor():
    bound_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out := torch.zeros(1, dtype=torch.int32))
    assert out.item() == 10


@triton.jit
def order_kernel(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0) * 3 + tl.program_id(1), tl.atomic_add(counter_ptr, 1))


def test_programs_run_in_a_shuffled_order_all_of_them():
    def run() -> list[int]:
        out = torch.full((12,), -1, dtype=torch.int32)
        order_kernel[(4, 3)](torch.zeros(1, dtype=torch.int32), out)
        return out.tolist()

    first = run()
    assert sorted(first) == list(range(12)) and first != list(range(12))
    assert run() != first, "another launch, another order"


def test_a_sample_runs_the_programs_at_either_end():
    out = torch.full((10,), -1, dtype=torch.int32)
    with strict_interpreter.sampling(2):
        scatter_kernel[(10,)](out, STEP=1, READ=False)
    assert out.tolist() == [0, 1, *[-1] * 6, 8, 9]
    scatter_kernel[(10,)](out, STEP=1, READ=False)
    assert out.tolist() == list(range(10))


def test_fresh_memory_is_poison():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2, 3, 4, 4), memory_format=torch.channels_last).isnan().all()


def test_the_same_order_and_numbers_in_every_test():
    """The fixtures seed each test: a failure is repeated by running that test alone."""
    assert torch.initial_seed() == 20240229
