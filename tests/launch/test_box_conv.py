"""box_conv_fprop and box_conv_dgrad, in boxes and walking, against torch's own convolution in float64."""

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fused_resnet.kernels import box_conv as kernels
from fused_resnet.launch import box_conv as launcher
from fused_resnet.launch.conv_dgrad import conv_dgrad
from fused_resnet.launch.conv_fprop import conv_fprop
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.box import why_not_boxes
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.launch.test_conv_fprop import DTYPES, assert_close, assert_stats, nhwc, operands, per_channel, rows

BOX = GemmConfig(16, 16, 16, num_warps=4, form="box")
FORMS = {
    "box": BOX,
    "transposed": replace(BOX, transposed=True),
    "one walk": replace(BOX, form="walk"),
    "three walks": replace(BOX, form="walk", split=3),
    "a walk a step": replace(BOX, form="walk", split=100),
}
PROBLEMS = [
    ConvProblem(2, 4, 8, 16, 32, 3, 3, padding=(1, 1), dtype="float64"),
    ConvProblem(16, 3, 5, 16, 16, 3, 3, padding=(1, 1), dtype="float64"),  # a pixel of sixteen images at once
    ConvProblem(8, 3, 2, 16, 20, 3, 3, padding=(1, 1), dtype="float64"),  # channels that do not fill their tile
    ConvProblem(32, 1, 1, 16, 16, 3, 3, padding=(1, 1), dtype="float64"),  # only the middle tap exists
    ConvProblem(4, 1, 12, 48, 32, 3, 3, padding=(1, 1), dtype="float64"),  # several steps of channels
    ConvProblem(1, 16, 1, 32, 16, 3, 3, padding=(1, 1), dtype="float64"),  # one column of one image
]


def fitted(config, reduced, problem):
    """``config`` for so many reduced channels: a walk takes them all at once."""
    if config.form == "walk":
        config = replace(config, block_k=reduced)
        if why_not_boxes(problem, 16, reduced, reduced, walks=True):
            pytest.skip("no box one row high tiles it, or its channels are no power of two")
    return config


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_fprop(problem, form):
    x, weight = operands(problem)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    y, tiles = conv_fprop(x, weight, problem, fitted(FORMS[form], problem.Ci, problem), stats=True)
    assert_close(y, expected, x.dtype)
    assert (tiles.rows_per_tile, tiles.rows) == (16, problem.M)
    # Boxes are no consecutive rows: what they add up to is what counts.
    mean = tiles.data[0].mean(0)
    m2 = tiles.data[1].sum(0) + 16 * ((tiles.data[0] - mean) ** 2).sum(0)
    torch.testing.assert_close(mean, expected.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m2, expected.var((0, 2, 3), unbiased=False) * problem.M, rtol=1e-12, atol=1e-12)


def test_statistics_are_those_of_each_box():
    """A box is a run of consecutive rows where it is as wide as the image."""
    problem = ConvProblem(1, 8, 8, 16, 16, 3, 3, padding=(1, 1), dtype="float64")
    x, weight = operands(problem)
    y, tiles = conv_fprop(x, weight, problem, replace(BOX, block_m=64), stats=True)
    assert_stats(tiles, y)
    assert conv_fprop(x, weight, problem, BOX)[1] is None


def masked(problem, dy, weight, y, stats):
    shape = (problem.N, problem.Ci, problem.H, problem.W)
    dx = torch.nn.grad.conv2d_input(shape, weight.double(), dy.double(), padding=1)
    pre = y.double() if stats is None else y.double() * per_channel(stats[2]) + per_channel(stats[3])
    return torch.where(pre <= 0, 0.0, dx)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["statistics", "activation", "none"])
@pytest.mark.parametrize("problem", PROBLEMS[:2] + PROBLEMS[4:], ids=str)
def test_dgrad(problem, mask, form):
    dy = nhwc(problem.N, problem.Co, problem.H, problem.W)
    y, weight = operands(problem)
    stats = rows(4, problem.Ci, y.dtype) if mask == "statistics" else None
    config = fitted(FORMS[form], problem.Co, problem)
    if mask == "none":
        dx, tiles = conv_dgrad(dy, weight, problem, config)
        assert tiles is None
        assert_close(dx, masked(problem, dy, weight, torch.ones_like(y), None), y.dtype)
        return
    dz, tiles = conv_dgrad(dy, weight, problem, config, mask_input=y, mask_stats=stats)
    assert_close(dz, masked(problem, dy, weight, y, stats), y.dtype)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(tiles[0].sum(0), dz.sum((0, 2, 3)), **close)
    product = dz * (y - per_channel(stats[0])) if stats is not None else torch.zeros_like(dz)
    torch.testing.assert_close(tiles[1].sum(0), product.sum((0, 2, 3)), **close)


@pytest.mark.parametrize("form", ["box", "transposed", "three walks"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lower_precision(dtype, form, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    problem = ConvProblem(4, 5, 4, 32, 16, 3, 3, padding=(1, 1), dtype=dtype)
    x, weight = operands(problem)
    y, tiles = conv_fprop(x, weight, problem, fitted(FORMS[form], 32, problem), stats=True)
    assert_close(y, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1), DTYPES[dtype])
    torch.testing.assert_close(tiles.data[0].mean(0), y.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    dy, stats = nhwc(4, 16, 5, 4, dtype=DTYPES[dtype]), rows(4, 32, x.dtype)
    dz, sums = conv_dgrad(dy, weight, problem, fitted(FORMS[form], 16, problem), mask_input=x, mask_stats=stats)
    assert_close(dz, masked(problem, dy, weight, x, stats), DTYPES[dtype])
    torch.testing.assert_close(sums[0].sum(0), dz.float().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_beyond_an_edge_does_not_leak_in(form):
    """Pixels beside each other in memory, of two images or at two ends of rows, are no neighbours."""
    problem = ConvProblem(8, 3, 4, 16, 16, 3, 3, padding=(1, 1), dtype="float64")
    x, weight = operands(problem)
    x[1, 0, 0, 0] = x[4, 3, 2, 3] = float("nan")
    y, _ = conv_fprop(x, weight, problem, FORMS[form], stats=True)
    expected = torch.zeros(8, 3, 4, dtype=torch.bool)
    expected[1, :2, :2] = expected[4, 1:, 2:] = True
    assert torch.equal(y.isnan(), expected[:, None].expand(8, 16, 3, 4))


def test_meta_tensors_are_only_recorded():
    problem = ConvProblem(256, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype="bfloat16")
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with record_launches() as launches:
        conv_fprop(x, weight, problem, GemmConfig(128, 64, 64, form="box"), stats=True)
        conv_dgrad(x, weight, problem, GemmConfig(64, 64, 64, split=264, form="walk"), mask_input=x)
    assert [entry.kernel for entry in launches] == ["box_conv_kernel", "walk_conv_kernel"]
    image, tile = 2 * x.numel(), 2 * 64 * 4
    assert [entry.flops for entry in launches] == [problem.flops] * 2
    assert launches[0].bytes == 2 * image + 2 * weight.numel() + problem.M // 128 * tile
    assert launches[1].bytes == 3 * image + 2 * weight.numel() + problem.M // 64 * tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": replace(PROBLEMS[0], stride=(2, 2))}, "boxes take a 3x3"),
        ({"problem": replace(PROBLEMS[0], groups=2)}, "groups"),
        ({"problem": replace(PROBLEMS[0], dtype="float32")}, "described in float32"),
        ({"config": replace(BOX, block_m=128)}, "no box of 128 pixels"),
        ({"config": replace(BOX, block_k=32)}, "16 channels, in steps of 32"),
        ({"config": replace(BOX, block_n=64)}, "of the last 64 channels 32 are none"),
        ({"x": torch.zeros(2, 16, 4, 8).double()}, "channels_last"),
        ({"weight": torch.zeros(32, 3, 3, 16).permute(0, 3, 1, 2)}, "weight must be torch.float64"),
        ({"input_affine": torch.zeros(2, 16).double()}, "no prologue"),
        ({"relu": True}, "no prologue"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    x, weight = operands(PROBLEMS[0])
    with pytest.raises(ValueError, match=message):
        conv_fprop(**{"x": x, "weight": weight, "problem": PROBLEMS[0], "config": BOX} | change)


PLANTED = {
    "taps not flipped": ("(8 - tap) * columns", "tap * columns"),
    "a tap too far": ("w0 + tap % 3 - 1", "w0 + tap % 3"),
    "a walk that starts late": ("tl.maximum(first - 2, 0)", "tl.maximum(first - 1, 0)"),
    "a column without its zero row": ("h > H, 1, 0", "h >= H, 1, 0"),
    "filter rows upside down": ("f20, f21, f22", "f00, f01, f02"),
    "one statistic for two boxes": ("column * H + h - 1", "column * H"),
    "a row above the image": ("tl.where(stores, h - 1, spare_h)", "h - 1"),
    "no spare images": ("tl.where(stores, n0, spare_n)", "n0"),
    "the mask a product with relu": ("relu_grad(acc, pre)", "acc * pre"),
    "sums not centred": ("values * (x - mean)", "values * x"),
}


def check_everything():
    problem = ConvProblem(2, 3, 8, 16, 16, 3, 3, padding=(1, 1), dtype="float64")
    for form in FORMS:
        test_fprop(problem, form)
        test_dgrad(problem, "statistics", form)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_caught(name, tmp_path, monkeypatch):
    old, new = PLANTED[name]
    source = Path(kernels.__file__).read_text()
    assert old in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("fused_resnet.kernels.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for kernel in ("box_conv_kernel", "walk_conv_kernel"):
        monkeypatch.setattr(launcher, kernel, getattr(mutant, kernel))
    with pytest.raises((AssertionError, InterpreterError)):
        check_everything()


def test_the_checks_pass_without_a_planted_error():
    check_everything()
