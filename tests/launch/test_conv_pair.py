"""conv_pair against both gradients in float64, by the numerics rule, and against the two kernels that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.launch.conv_dgrad import conv_dgrad
from fused_resnet.launch.conv_pair import conv_pair
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig, supports
from fused_resnet.plan.conv_pair import pair_candidates
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import A100, H100, INTERPRETER
from tests import numerics, test_large_tensors
from tests.bits import pack
from tests.conftest import INTERPRETED
from tests.planted_bugs import Bug, mutated_source, survives
from tests.staged_case import bottleneck, identity

pytestmark = [pytest.mark.usefixtures("ieee"), pytest.mark.skipif(not INTERPRETED, reason="the interpreter's tiles")]

CONFIG = GemmConfig(32, 16, 32, num_warps=4, split=3)
PROBLEMS = [
    ConvProblem(3, 9, 7, 40, 24),  # nothing fills its block
    ConvProblem(2, 7, 5, 35, 17),  # odd channels: no row begins at a multiple of 16 bytes
    ConvProblem(1, 3, 5, 33, 20),  # fewer rows than a tile has, ranges without any
    ConvProblem(4, 4, 6, 32, 32),  # everything fills its block
]
SHORTCUTS = ("none", "plain", "strided", "bits")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def image(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def operands(p: ConvProblem, dtype: torch.dtype, shortcut: str = "none") -> dict[str, Any]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    given: dict[str, Any] = {
        "x": image(p.N, p.Ci, p.H, p.W, dtype=dtype, mean=0.5),
        "dz": image(p.N, p.Co, p.H, p.W, dtype=dtype),
        "y": image(p.N, p.Co, p.H, p.W, dtype=dtype),
        "coeffs": torch.randn(3, p.Co, dtype=acc),
        "weight": image(p.Co, p.Ci, 1, 1, dtype=dtype),
    }
    if shortcut == "strided":
        given |= {"residual": image(p.N, p.Ci, -(-p.H // 2), -(-p.W // 3), dtype=dtype), "residual_stride": (2, 3)}
    elif shortcut != "none":
        given["residual"] = image(p.N, p.Ci, p.H, p.W, dtype=dtype)
    if shortcut == "bits":
        given["residual_bits"] = pack(torch.randn(p.M, p.Ci) > 0)
    return given


def by_torch(p: ConvProblem, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Both gradients in ``dtype``, as eager PyTorch would compute them: dy is rounded, and dx before the sum."""
    acc = torch.promote_types(dtype, torch.float32)
    a, b, c = given["coeffs"].to(acc)[:, None, :, None, None]
    dy = (a * given["dz"].to(acc) + (b * given["y"].to(acc) + c)).to(dtype)
    x, weight = given["x"].to(dtype), given["weight"].to(dtype)
    dx = torch.nn.grad.conv2d_input(x.shape, weight, dy)
    dw = torch.nn.grad.conv2d_weight(x, weight.shape, dy)
    if "residual" in given:
        residual = given["residual"].to(dtype)
        if "residual_bits" in given:
            rows = residual.permute(0, 2, 3, 1).flatten(0, 2)
            through = (given["residual_bits"][:, :, None] >> torch.arange(8)).flatten(1)[:, : p.Ci] & 1
            residual = torch.where(through.bool(), rows, 0.0).view(p.N, p.H, p.W, p.Ci).permute(0, 3, 1, 2)
        down, right = given.get("residual_stride", (1, 1))
        dx[:, :, ::down, ::right] += residual
    return {"dx": dx, "dw": dw}


def judge(p: ConvProblem, given: dict[str, Any], config: GemmConfig = CONFIG) -> None:
    dtype = given["x"].dtype
    dx, dw = conv_pair(problem=p, config=config, out_dtype=dtype, **given)
    assert dx.dtype == dw.dtype == dtype and dw.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    numerics.check_all({"dx": dx, "dw": dw}, by_torch(p, given, dtype), by_torch(p, given, torch.float64))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_numerics_rule(problem: ConvProblem, dtype: str, shortcut: str) -> None:
    problem = replace(problem, dtype=dtype)
    judge(problem, operands(problem, HALVES[dtype], shortcut))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("split", [1, 2, 40])
def test_float64_in_any_number_of_ranges(split: int, shortcut: str) -> None:
    problem = replace(PROBLEMS[0], dtype="float64")
    given = operands(problem, torch.float64, shortcut)
    dx, dw = conv_pair(problem=problem, config=replace(CONFIG, split=split), out_dtype=torch.float64, **given)
    expected = by_torch(problem, given, torch.float64)
    torch.testing.assert_close(dx, expected["dx"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dw, expected["dw"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_two_kernels_compute_the_same(dtype: str) -> None:
    """The same dy, rounded as they round it: a bit in a hundred of dx differs at the most, by the products' order."""
    problem = replace(PROBLEMS[0], dtype=dtype)
    given = operands(problem, HALVES[dtype], "plain")
    dx, dw = conv_pair(problem=problem, config=CONFIG, out_dtype=torch.float32, **given)
    on_load = {"y": given["y"], "coeffs": given["coeffs"]}
    tile = GemmConfig(32, 16, 32, num_warps=4, split=3)
    apart, _ = conv_dgrad(given["dz"], given["weight"], problem, tile, residual=given["residual"], **on_load)
    assert (dx != apart).float().mean() < 0.01
    tile = GemmConfig(32, 16, 32, num_warps=4, split=3)
    torch.testing.assert_close(
        dw, conv_wgrad(given["x"], given["dz"], problem, tile, out_dtype=torch.float32, **on_load), rtol=1e-5, atol=1e-4
    )


def test_two_runs_agree_bit_for_bit() -> None:
    problem = replace(PROBLEMS[1], dtype="float32")
    given = operands(problem, torch.float32, "bits")
    first, second = (conv_pair(problem=problem, config=CONFIG, out_dtype=torch.float32, **given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_stays_where_it_belongs() -> None:
    problem = replace(PROBLEMS[0], dtype="float32")
    given = operands(problem, torch.float32)
    given["x"][0, 1, 2, 3] = given["dz"][0, 2, 0, 0] = float("nan")
    dx, dw = conv_pair(problem=problem, config=CONFIG, out_dtype=torch.float32, **given)
    expected = by_torch(problem, given, torch.float32)
    assert torch.equal(dx.isnan(), expected["dx"].isnan()) and torch.equal(dw.isnan(), expected["dw"].isnan())


def test_records_on_meta() -> None:
    problem = ConvProblem(8, 56, 56, 256, 64)
    given = {
        name: t.to("meta") for name, t in operands(ConvProblem(8, 56, 56, 256, 64), torch.bfloat16, "plain").items()
    }
    with record_launches() as launches:
        dx, dw = conv_pair(problem=problem, config=pair_candidates(problem, H100)[0], out_dtype=torch.float32, **given)
    assert dx.shape == given["x"].shape and dw.shape == (64, 256, 1, 1) and dw.dtype == torch.float32
    main, reduce = launches
    parts = main.config["split"] * 64 * 256 * 4
    assert (main.kernel, reduce.kernel) == ("conv_pair_kernel", "conv_wgrad_reduce_kernel")
    assert main.flops == 2 * problem.flops
    assert main.bytes == 2 * problem.M * (3 * 256 + 2 * 64) + 2 * 64 * 256 + 4 * 3 * 64 + parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": ConvProblem(3, 9, 7, 40, 24, stride=(2, 2), dtype="float32")}, "unstrided 1x1"),
        ({"problem": ConvProblem(3, 9, 7, 40, 24, 3, 3, dtype="float32")}, "unstrided 1x1"),
        ({"config": GemmConfig(32, 16, 16)}, "up to 16 output channels"),
        ({"coeffs": torch.zeros(2, 24)}, "coeffs must have shape"),
        ({"weight": torch.zeros(24, 40, 1, 1).half()}, "weight must be torch.float32"),
        ({"dz": torch.zeros(3, 24, 9, 7)}, "channels_last"),
        ({"residual": torch.zeros(3, 40, 5, 4), "residual_stride": (1, 2)}, "residual must have shape"),
        ({"residual_bits": torch.zeros(189, 5, dtype=torch.uint8)}, "residual_bits goes with a residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    problem = replace(PROBLEMS[0], dtype="float32")
    given = operands(problem, torch.float32) | {"problem": problem, "config": CONFIG, "out_dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        conv_pair(**given | change)


@pytest.mark.quick
def test_which_problems_have_candidates() -> None:
    conv1 = ConvProblem(256, 56, 56, 256, 64)
    found = pair_candidates(conv1, H100)
    assert len(found) == len(set(found)) >= 6 and all(supports(conv1, "pair", H100, config)[0] for config in found)
    assert all(config.block_k == 64 and -(-conv1.M // config.split) <= 12_288 for config in found)
    assert all(config.block_n <= 64 for config in pair_candidates(replace(conv1, Ci=64), H100))
    assert pair_candidates(conv1, A100) and pair_candidates(replace(conv1, Co=20), INTERPRETER)
    for other in ({"Co": 128}, {"stride": (2, 2)}, {"R": 3, "S": 3}, {"groups": 2}, {"dtype": "float32"}):
        assert not pair_candidates(replace(conv1, **other), H100), other
    for config, words in (
        (GemmConfig(32, 128, 32), "all 64 output channels"),
        (GemmConfig(256, 256, 64, num_stages=4), "shared memory"),
    ):
        ok, reason = supports(conv1, "pair", H100, config)
        assert not ok and words in reason


def check_blocks() -> None:
    """Whole blocks whose first convolution has both gradients by one kernel, over a projection and over an identity."""
    bottleneck(torch.bfloat16, source="paired").check()
    identity(torch.float32, source="paired").check()
    identity(torch.float16, seed=1, source="paired").check()


def check_long() -> None:
    """Many steps of one range: an accumulator of 16 bits has time to lose them."""
    problem = ConvProblem(2, 24, 23, 20, 18)
    judge(problem, operands(problem, torch.bfloat16), replace(CONFIG, block_m=16, split=1))


def check_large() -> None:
    with test_large_tensors.reserving_memory():
        test_large_tensors.test_conv_pair()


SCENARIOS = {"blocks": check_blocks, "long": check_long, "large": check_large}
KERNEL = "kernels.conv_pair"
BUGS = [
    Bug("no y", KERNEL, "affine(widened(y, ACC), y_scale, shift)", "shift", ("blocks",)),
    Bug("dz in place of dy", KERNEL, "dy = dy.to(dz.dtype)", "dy = dz", ("blocks",)),
    Bug("the last rows of a range lost", KERNEL, "range(first, last,", "range(first, last - BLOCK_M + 1,", ("blocks",)),
    Bug("ranges that overlap", KERNEL, "first = split * rows_per_split", "first = split * BLOCK_M", ("blocks",)),
    Bug("the shortcut lost", KERNEL, "dx += other.to(ACC)", "dx += 0.0", ("blocks",)),
    Bug("the first w for all", KERNEL, "tl.load(w_ptr + offs_w,", "tl.load(w_ptr + offs_w % BLOCK_N,", ("blocks",)),
    Bug("sums in 16 bits", KERNEL, "dy, acc, input_precision=PRECISION, out_dtype=ACC)",
        "dy, acc, input_precision=PRECISION, out_dtype=ACC).to(x.dtype).to(ACC)", ("long",)),
    Bug("rows counted in 32 bits", KERNEL, "offs_m.to(tl.int64)[:, None]", "offs_m[:, None]", ("large",)),
    Bug("the shortcut of another path", "autograd.staged_backward", "_both_gradients(step, pending.dz, sums, shortcut)",
        "_both_gradients(step, pending.dz, sums, Shortcut())", ("blocks",)),
]  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_whole_blocks_and_long_ranges_by_the_numerics_rule(name: str) -> None:
    SCENARIOS[name]()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_refused(bug: Bug) -> None:
    assert not survives(bug, SCENARIOS, (Exception,)), f"'{bug.name}' survives {', '.join(bug.scenarios)}"


@pytest.mark.quick
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_mutation_still_applies(bug: Bug) -> None:
    compile(mutated_source(bug), bug.module, "exec")
