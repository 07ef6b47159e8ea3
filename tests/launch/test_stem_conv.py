"""stem_conv against torch's own convolution and weight gradient in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_resnet.launch.record import record_launches
from fused_resnet.launch.stem_conv import stem_conv_fprop, stem_conv_wgrad
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FPROP = GemmConfig(32, 16, 32, num_warps=4)
WGRAD = GemmConfig(16, 128, 32, num_warps=4, split=3)

PROBLEMS = [
    ConvProblem(2, 14, 11, 3, 20, 7, 7, stride=(2, 2), padding=(3, 3)),
    ConvProblem(1, 9, 16, 1, 5, 7, 7, stride=(2, 2), padding=(3, 3)),
    ConvProblem(2, 7, 6, 3, 16, 3, 3, padding=(1, 1)),  # every origin a multiple of four elements only
    ConvProblem(1, 13, 8, 4, 33, 5, 5, stride=(1, 2), padding=(2, 0)),
    ConvProblem(3, 9, 7, 2, 4, 2, 8, stride=(3, 4), padding=(0, 5)),  # a run without a rest, pixels that nobody reads
    ConvProblem(1, 12, 9, 3, 7, 3, 4, stride=(2, 3), padding=(2, 1), dilation=(3, 1)),
    ConvProblem(5, 1, 1, 3, 4, 3, 3, padding=(1, 1)),  # many images in one block of rows
    ConvProblem(1, 9, 4, 3, 4, 7, 1, stride=(1, 1), padding=(3, 0)),
    ConvProblem(4, 8, 8, 3, 16, 3, 3, stride=(2, 2), padding=(1, 1)),  # rows fill the blocks exactly
    ConvProblem(1, 3, 300, 3, 4, 3, 3, padding=(1, 1)),  # a row longer than a block of the padded copy
]


def nhwc(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def operands(p: ConvProblem, dtype: torch.dtype) -> tuple[ConvProblem, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The problem in ``dtype``, x, weight, dy."""
    typed = replace(p, dtype=str(dtype).removeprefix("torch."))
    x = nhwc(p.N, p.Ci, p.H, p.W, dtype=dtype, seed=1)
    weight = nhwc(p.Co, p.Ci, p.R, p.S, dtype=dtype, seed=2)
    return typed, x, weight, nhwc(p.N, p.Co, p.P, p.Q, dtype=dtype, seed=3)


def conv(x: torch.Tensor, weight: torch.Tensor, p: ConvProblem) -> torch.Tensor:
    return torch.nn.functional.conv2d(x.double(), weight.double(), None, p.stride, p.padding, p.dilation)


def conv_weight(x: torch.Tensor, dy: torch.Tensor, p: ConvProblem) -> torch.Tensor:
    shape = (p.Co, p.Ci, p.R, p.S)
    return torch.nn.grad.conv2d_weight(x.double(), shape, dy.double(), p.stride, p.padding, p.dilation)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("block_k", [32, 64, 256])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward(problem: ConvProblem, block_k: int) -> None:
    problem, x, weight, _ = operands(problem, torch.float64)
    config = GemmConfig(32, 16, block_k, num_warps=4)
    y, tiles = stem_conv_fprop(x, weight, problem, config, stats=True)
    assert_close(y, conv(x, weight, problem), 1e-12)
    assert tiles is not None and tiles.rows_per_tile == 32 and tiles.rows == problem.M
    rows = y.permute(0, 2, 3, 1).reshape(problem.M, problem.Co)
    for t, part in enumerate(rows.split(32)):
        m2 = part.var(0, correction=0) * len(part)
        torch.testing.assert_close(tiles.data[:, t], torch.stack([part.mean(0), m2]))
    plain, none = stem_conv_fprop(x, weight, problem, config)
    assert none is None and torch.equal(plain, y)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("block_n", [32, 256])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_weight_gradient(problem: ConvProblem, block_n: int, split: int) -> None:
    problem, x, _, dy = operands(problem, torch.float64)
    config = GemmConfig(16, block_n, 16, num_warps=4, split=split)
    dw = stem_conv_wgrad(x, dy, problem, config, out_dtype=torch.float64)
    assert_close(dw, conv_weight(x, dy, problem), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    problem, x, weight, dy = operands(PROBLEMS[0], dtype)
    y, tiles = stem_conv_fprop(x, weight, problem, FPROP, stats=True)
    assert y.dtype == dtype and tiles is not None and tiles.data.dtype == torch.float32
    assert_close(y, conv(x, weight, problem), TOLERANCE[dtype])
    stored = y.permute(0, 2, 3, 1).reshape(problem.M, problem.Co)[:32].float()
    torch.testing.assert_close(tiles.data[0, 0], stored.mean(0))
    for out_dtype in (dtype, torch.float32):
        dw = stem_conv_wgrad(x, dy, problem, WGRAD, out_dtype=out_dtype)
        assert dw.dtype == out_dtype
        assert_close(dw, conv_weight(x, dy, problem), TOLERANCE[dtype])


def test_two_runs_agree_bit_for_bit() -> None:
    problem, x, _, dy = operands(PROBLEMS[0], torch.float32)
    first, second = (stem_conv_wgrad(x, dy, problem, WGRAD, out_dtype=torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_infinity_reaches_the_outputs_that_read_it() -> None:
    problem, x, weight, dy = operands(PROBLEMS[0], torch.float64)
    x[0, 1, 2, 3] = torch.inf
    y, _ = stem_conv_fprop(x, weight, problem, FPROP)
    expected = conv(x, weight, problem).isfinite()
    assert not y.isfinite()[~expected].any()
    assert y.isfinite()[1].all() and y.isfinite()[0, :, :, 4:].all()
    dw = stem_conv_wgrad(x, dy, problem, WGRAD, out_dtype=torch.float64)
    assert dw.isfinite()[:, [0, 2]].all() and not dw.isfinite()[:, 1].all()


def test_records_on_meta() -> None:
    p = ConvProblem(8, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3))
    x, dy, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
        for shape in ((8, 3, 224, 224), (8, 64, 112, 112), (64, 3, 7, 7))
    )
    with record_launches() as launches:
        y, tiles = stem_conv_fprop(x, weight, p, GemmConfig(128, 64, 32), stats=True)
        stem_conv_wgrad(x, dy, p, GemmConfig(64, 256, 64, split=4), out_dtype=torch.float32)
    assert y.shape == dy.shape and tiles is not None
    image, weights, padded, run, statistics = x.nbytes, weight.nbytes, 8 * 229 * 230 * 4 * 2, 64 * 7 * 32 * 2, 2 * 784
    partial, dw = 4 * weight.numel() * 4, weight.numel() * 4
    assert [(launch.kernel, launch.flops, launch.bytes) for launch in launches] == [
        ("stem_pad_kernel", 0, image + padded),
        ("stem_pad_kernel", 0, weights + run),
        ("stem_conv_fprop_kernel", p.flops, padded + run + y.nbytes + statistics * 64 * 4),
        ("stem_pad_kernel", 0, image + padded),
        ("stem_conv_wgrad_kernel", p.flops, padded + dy.nbytes + partial),
        ("conv_wgrad_reduce_kernel", 0, partial + dw),
    ]


def test_refuses_what_it_cannot_do() -> None:
    problem, x, weight, dy = operands(PROBLEMS[0], torch.float32)
    with pytest.raises(ValueError, match="whole rows of the filter"):
        stem_conv_fprop(x, weight, problem, GemmConfig(16, 16, 16))
    with pytest.raises(ValueError, match="channels_last"):
        stem_conv_wgrad(x.contiguous(), dy, problem, WGRAD, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="described in"):
        stem_conv_fprop(x.double(), weight.double(), problem, FPROP)
    for changed in ({"Ci": 5}, {"S": 9}, {"dilation": (1, 2)}, {"R": 1, "S": 1}, {"groups": 3}):
        with pytest.raises(ValueError, match="few channels"):
            stem_conv_fprop(x, weight, replace(problem, **changed), FPROP)
