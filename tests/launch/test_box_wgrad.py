"""box_wgrad against torch's own weight gradient in float64."""

from dataclasses import replace

import pytest
import torch

from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.launch.test_conv_wgrad import DTYPES, assert_close, operands, reference

CONFIG = GemmConfig(16, 16, 16, num_warps=4, form="box")
PROBLEMS = [
    ConvProblem(2, 4, 8, 16, 32, 3, 3, padding=(1, 1)),
    ConvProblem(3, 7, 5, 16, 8, 3, 3, padding=(1, 1)),  # no box tiles it
    ConvProblem(5, 1, 1, 8, 8, 3, 3, padding=(1, 1)),  # only the middle tap exists
    ConvProblem(1, 9, 1, 24, 40, 3, 3, padding=(1, 1)),
    ConvProblem(1, 1, 3, 16, 16, 3, 3, padding=(1, 1)),  # one box, mostly empty
]


@pytest.mark.parametrize("split", [1, 3, 40])
@pytest.mark.parametrize("taps", [1, 3, 9])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_plain(problem, taps, split):
    problem = replace(problem, dtype="float64")
    x, dy = operands(problem, torch.float64)
    config = replace(CONFIG, row_taps=taps, split=split)
    dw = conv_wgrad(x, dy, problem, config, out_dtype=torch.float64)
    assert_close(dw, reference(x, dy, problem), torch.float64)


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lower_precision(dtype, taps, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    problem = replace(PROBLEMS[1], dtype=dtype)
    x, dy = operands(problem, DTYPES[dtype])
    dw = conv_wgrad(x, dy, problem, replace(CONFIG, row_taps=taps, split=2), out_dtype=torch.float32)
    assert_close(dw, reference(x, dy, problem), DTYPES[dtype])


def test_what_lies_beyond_an_edge_does_not_leak_in():
    """A pixel meets the gradients of its neighbours alone: none of the next image's or of the row's other end."""
    problem = ConvProblem(2, 3, 4, 8, 8, 3, 3, padding=(1, 1), dtype="float64")
    x, dy = torch.zeros(2, 2, 8, 3, 4, dtype=torch.float64)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x[0, 0, 2, 3] = 1.0  # the last pixel of the first image
    dy[1, :, 0], dy[0, :, 0], dy[0, :, :, 0] = 1.0, 1.0, 1.0
    for taps in (1, 3, 9):
        dw = conv_wgrad(x, dy, problem, replace(CONFIG, row_taps=taps), out_dtype=torch.float64)
        assert not dw.any()


def test_meta_tensors_are_only_recorded():
    problem = ConvProblem(256, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype="bfloat16")
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with record_launches() as launches:
        conv_wgrad(x, x, problem, replace(CONFIG, row_taps=9, split=132), out_dtype=torch.float32)
    assert [entry.kernel for entry in launches] == ["box_wgrad_kernel", "conv_wgrad_reduce_kernel"]
    assert launches[0].flops == problem.flops
    assert launches[0].bytes == 2 * 2 * x.numel() + 132 * 9 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": replace(PROBLEMS[0], stride=(2, 2), dtype="float64")}, "boxes take|box kernels take"),
        ({"config": replace(CONFIG, row_taps=2)}, "row_taps is 1, 3 or 9"),
        ({"input_affine": torch.zeros(2, 16).double()}, "nothing is formed on load"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    problem = replace(PROBLEMS[0], dtype="float64")
    x, dy = operands(problem, torch.float64)
    with pytest.raises(ValueError, match=message):
        conv_wgrad(**{"x": x, "dy": dy, "problem": problem, "config": CONFIG, "out_dtype": torch.float64} | change)
