"""A whole bottleneck in one launch against torch's own convolutions; the barriers between its writes and reads."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.errors import InterpreterError

from fused_resnet.launch.bottleneck_single import FrozenLayer, bottleneck_single
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import SingleConfig
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem
from tests import barriers
from tests.conftest import INTERPRETED
from tests.planted_bugs import Bug, planted

Tensor = torch.Tensor
SMALL = SingleConfig(16, 16, 16, num_warps=4, block_halo=16, tile_p=3, tile_q=5, programs=2)
WIDE = torch.float64 if INTERPRETED else torch.float32
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OTHER_PYTHON = os.environ.get("FUSED_RESNET_OTHER_PYTHON")


@pytest.fixture(autouse=True)
def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@dataclass
class Case:
    """A block's tensors and its problem; ``residual`` is x itself, another tensor or None."""

    x: Tensor
    layers: tuple[FrozenLayer, FrozenLayer, FrozenLayer]
    problem: ChainProblem
    projection: FrozenLayer | None = None
    residual: Tensor | None = None

    def run(self, config: SingleConfig = SMALL, **changed: Any) -> Tensor:
        shortcut = {"projection": self.projection, "residual": self.residual}
        arguments = {"x": self.x, "layers": self.layers, "problem": self.problem, **shortcut, **changed}
        return bottleneck_single(**arguments, config=config)

    def reference(self) -> Tensor:
        """In float64, without intermediate rounding."""
        first, second, third = zip(self.layers, self.problem.convs, strict=True)
        x = self.x.double()
        z = layer(layer(layer(x, *first).relu(), *second).relu(), *third)
        if self.projection is not None:
            z = z + layer(x, self.projection, self.problem.projection)
        elif self.residual is not None:
            z = z + self.residual.double()
        return z.relu() if self.problem.relu else z

    def check(self, config: SingleConfig = SMALL) -> None:
        out, expected = self.run(config), self.reference()
        assert out.shape == expected.shape and out.dtype == self.x.dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert (out.double() - expected).norm() <= TOLERANCE[out.dtype] * expected.norm()


def layer(x: Tensor, frozen: FrozenLayer, conv: ConvProblem | None) -> Tensor:
    assert conv is not None
    weight, *rows = (None if t is None else t.double() for t in frozen[:5])
    gamma, beta, mean, var = rows
    y = F.conv2d(x, weight, None, conv.stride, conv.padding)
    return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, frozen.eps)


def nhwc(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def frozen(conv: ConvProblem, dtype: torch.dtype, rows: torch.dtype = torch.float32) -> FrozenLayer:
    def row(base: float, spread: float = 0.3) -> Tensor:
        return (base + spread * torch.randn(conv.Co)).to(rows)

    weight = nhwc(conv.Co, conv.Ci, conv.R, conv.S, dtype=torch.float64) * (2 / (conv.Ci * conv.taps)) ** 0.5
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return FrozenLayer(weight, row(1), row(0), row(0), (0.5 + torch.rand(conv.Co)).to(rows), 1e-3)


def make(
    size: tuple[int, int, int] = (2, 7, 11),
    ci: int = 20,
    c: int = 5,
    kind: str = "identity",
    stride: int = 1,
    dtype: torch.dtype = WIDE,
    relu: bool = True,
) -> Case:
    (n, h, w), name = size, str(dtype).removeprefix("torch.")
    co = ci if kind == "identity" else 18
    strides = (stride, stride)
    first = ConvProblem(n, h, w, ci, c, dtype=name)
    second = ConvProblem(n, h, w, c, c, 3, 3, strides, (1, 1), dtype=name)
    last = ConvProblem(n, second.P, second.Q, c, co, dtype=name)
    projection = ConvProblem(n, h, w, ci, co, stride=strides, dtype=name) if kind == "projection" else None
    x = nhwc(n, ci, h, w, dtype=dtype)
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    given = nhwc(n, co, last.P, last.Q, dtype=dtype) if kind == "given" else None
    return Case(
        x,
        (frozen(first, dtype, rows), frozen(second, dtype, rows), frozen(last, dtype, rows)),
        ChainProblem((first, second, last), projection, kind, relu, False, False),
        frozen(projection, dtype, rows) if projection else None,
        x if kind == "identity" else given,
    )


SIZES = ((1, 1, 1), (1, 1, 9), (3, 2, 1), (1, 3, 5), (2, 6, 10), (1, 7, 16), (5, 4, 4))
KINDS = ("none", "identity", "given", "projection")


@pytest.mark.quick
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_shortcuts_and_strides(kind: str, stride: int, relu: bool) -> None:
    if kind == "identity" and stride > 1:
        pytest.skip("a strided block has no identity")
    make(kind=kind, stride=stride, relu=relu).check()


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_images_that_fill_their_tiles_or_do_not(kind: str, size: tuple[int, int, int]) -> None:
    make(size, kind=kind).check()
    make(size, kind=kind).check(replace(SMALL, tile_p=1, tile_q=16, programs=1))


@pytest.mark.parametrize(("ci", "c"), [(1, 1), (16, 16), (32, 17), (40, 64), (64, 33)])
@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_widths(kind: str, ci: int, c: int) -> None:
    make((1, 4, 7), ci, c, kind).check()


def test_tiles_blocks_and_programs_change_nothing() -> None:
    case = make((2, 7, 11), kind="projection", stride=2)
    outs = [
        case.run(replace(SMALL, **change))
        for change in (
            {},
            {"programs": 1},
            {"programs": 99},
            {"block_halo": 128},
            {"block_n": 64, "block_k": 64},
            {"block_m": 64, "tile_p": 7, "tile_q": 9},
        )
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    make((2, 5, 9), 24, 20, kind, dtype=dtype).check()


def test_batch_norms_of_other_dtypes_or_without_parameters() -> None:
    case = make(dtype=torch.float32)
    first, second, third = case.layers
    half = third._replace(**{name: getattr(third, name).to(torch.float16) for name in ("gamma", "beta", "mean", "var")})
    case.layers = (first._replace(gamma=None), second._replace(gamma=None, beta=None), half)
    case.check()


@pytest.mark.quick
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(value: float) -> None:
    case = make((1, 9, 11), 17, 5, "given")
    clean = case.run()
    case.x[0, 3, 4, 6] = value
    out, expected = case.run(), case.reference()
    assert torch.equal(out.isfinite(), expected.isfinite())
    near = torch.zeros(9, 11, dtype=torch.bool)
    near[3:6, 5:8] = True
    assert torch.equal(out[..., ~near], clean[..., ~near]) and not out[..., near].isfinite().all()


def test_a_nan_in_one_weight_poisons_as_in_eager() -> None:
    """The channels that fill a block up repeat the last one's weights: none of theirs may come through."""
    case = make((1, 4, 5), 7, 5, "given")
    case.layers[0].weight[4, 2] = float("inf")
    case.layers[2].weight[:, 4] = 0.0
    assert torch.equal(case.run().isnan(), case.reference().isnan())


def test_the_record_counts_the_halo_and_the_scratch() -> None:
    case = make((2, 7, 11), 20, 5, "projection", dtype=torch.float32)
    with record_launches() as launches:
        out = case.run()
    (launch,) = launches
    tiles, halo = 2 * 3 * 3, 5 * 7
    pixels = 2 * 7 * 11
    assert launch.kernel == "bottleneck_single_kernel"
    assert launch.flops == 2 * (tiles * halo * 20 * 5 + pixels * (9 * 5 * 5 + 5 * 18 + 20 * 18))
    parameters = [t for layer in (*case.layers, case.projection) for t in layer[:5]]
    workspace = 2 * (halo * 16 + 2 * (5 + 5 + 18 + 18))
    assert launch.bytes == 4 * (case.x.numel() + out.numel() + sum(t.numel() for t in parameters) + workspace)


@pytest.mark.quick
def test_it_refuses() -> None:
    case = make(dtype=torch.float32)
    first, second, third = case.layers
    for changed, text in (
        ({"x": case.x.contiguous()}, "channels_last"),
        ({"x": case.x.double()}, "float32"),
        ({"residual": case.x[:, :7]}, "residual must have shape"),
        ({"projection": third}, "projection"),
        ({"layers": (first, second._replace(mean=second.mean[:3]), third)}, "mean must have shape"),
        ({"layers": (first, second, third._replace(var=third.var.int()))}, "var must be"),
        ({"layers": (first, first, third)}, "weight must have shape"),
        ({"config": replace(SMALL, tile_p=4)}, "does not fit"),
        ({"problem": replace(case.problem, batch_statistics=True)}, "batch statistics"),
        ({"problem": replace(case.problem, convs=case.problem.convs[:2])}, "bottleneck"),
    ):
        with pytest.raises(ValueError, match=text):
            case.run(**changed)


# ---------------------------------------------------------------- planted errors

KERNEL = "kernels.bottleneck_single"
BUGS = {
    "padding that is relu(shift)": ("tl.where(inside[:, None] & mask_c[None, :], a1, 0.0)", "a1"),
    "a halo one column off": ("w = offs_h % HALO_W - 1", "w = offs_h % HALO_W"),
    "the image above in the halo": ("(h >= -p0 * STRIDE_H) & ", ""),
    "the next row in the halo": (" & (w < W - q0 * STRIDE_W)", ""),
    "a lost part of the halo": ("range(0, HALO, BLOCK_HALO)", "range(0, HALO - BLOCK_HALO, BLOCK_HALO)"),
    "a lost tap": ("for tap in range(9)", "for tap in range(8)"),
    "taps transposed": ("tap // 3 * HALO_W + tap % 3", "tap % 3 * HALO_W + tap // 3"),
    "a lost last tile": ("range(tl.program_id(0), tiles,", "range(tl.program_id(0), tiles - 1,"),
    "one scratch for all": ("scratch_ptr += pid * (HALO * BLOCK_C)", "scratch_ptr += 0"),
    "another layer's scale": ("normalise(acc, second_ptr", "normalise(acc, first_ptr"),
    "wrong eps": ("var + layer.eps", "var + 10 * layer.eps"),
    "no ReLU between": ("a2 = relu(normalise(acc, second_ptr, C, offs_c, mask_c))", "a2 = (acc)"),
    "the shortcut of another pixel": ("row_x = i * STRIDE_H * W + j * STRIDE_W", "row_x = i * W + j"),
    "a raw projection": ("z += normalise(r, shortcut_ptr, Co, offs_n, mask_n)", "z += r"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_errors_are_caught(name: str) -> None:
    with planted(Bug(name, KERNEL, *BUGS[name], ())), pytest.raises((AssertionError, InterpreterError)):
        make(kind="identity").check()
        make(kind="projection", stride=2).check()


# ---------------------------------------------------------------- the barriers


ORDERED = ("bwbrb", "wbrbr", "bwbrb")
"""Behind the preamble's barrier: written, a barrier, read, a barrier, and again for the next tile. No descriptor."""
MISSING = {0: ("wbrb", "wrbr", "wbrb"), 1: ("bwrb", "wbrbr", "bwrb"), 2: ("bwbr", "wbrbr", "bwbr")}
"""The same without one of the three barriers. The compiler's own, by which each still computes right, do not count."""
EXPECTED = {None: {ORDERED}, **{barrier: {order} for barrier, order in MISSING.items()}}


def orders(**options: str) -> dict[int | None, set[tuple[str, str, str]]]:
    """By the barrier left out: (scratch, affine) as Triton's IR orders them, and the scratch as PTX does."""
    found: dict[int | None, set[tuple[str, str, str]]] = {}
    for row in barriers.run(**options):
        order = (row["ttgir"]["scratch_ptr"], row["ttgir"]["affine_ptr"], row["ptx"])
        found.setdefault(row["without"], set()).add(order)
    return found


def test_explicit_barriers_stand_between_writes_and_reads_and_a_missing_one_is_seen() -> None:
    assert orders() == EXPECTED


@pytest.mark.slow
@pytest.mark.skipif(not OTHER_PYTHON, reason="FUSED_RESNET_OTHER_PYTHON names no Python with another Triton")
def test_the_barriers_under_the_other_triton() -> None:
    assert orders(python=OTHER_PYTHON) == EXPECTED


@pytest.mark.quick
def test_a_descriptor_of_the_scratch_would_be_seen() -> None:
    ir = "%0 = tt.addptr %scratch_ptr, %o : !tt.ptr<bf16>\n%1 = tt.make_tensor_descriptor %0, [%a]\nttg.barrier all"
    assert barriers.in_ttgir(ir, "scratch_ptr") == "db"
