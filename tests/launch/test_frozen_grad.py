"""Gradients of parameters behind frozen statistics, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.launch.frozen_grad import frozen_grad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.passes import frozen_grad_config

pytestmark = pytest.mark.quick
SHAPES = [(7, 5, 3, 3), (70, 40, 1, 1), (3, 300, 3, 3), (1, 1, 1, 1)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the kernel reads, made in float64 and rounded, and (dW, dgamma) by autograd of what was rounded."""
    co, ci, r, s = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    make = {"dtype": torch.float64, "device": device}
    x, dz = torch.randn(2, ci, 5, 4, **make), torch.randn(2, co, 6 - r, 5 - s, **make)
    weight = torch.randn(shape, **make).to(dtype).double().requires_grad_()
    gamma, mean = torch.randn(co, **make).requires_grad_(), torch.randn(co, **make)
    rstd = torch.rand(co, **make) + 0.5
    stats = torch.stack([mean, rstd, gamma.detach() * rstd, torch.randn(co, **make)]).to(wide)
    y = F.conv2d(x, weight)
    t = torch.autograd.grad(y, weight, dz, retain_graph=True)[0]
    z = (y - stats[0].double().view(-1, 1, 1)) * (stats[1].double() * gamma).view(-1, 1, 1)
    dw, dgamma = torch.autograd.grad(z, (weight, gamma), dz)
    nhwc = {"memory_format": torch.channels_last}
    read = {
        "t": t.to(wide, **nhwc),
        "weight": weight.detach().to(dtype, **nhwc),
        "stats": stats,
        "sum_dz": dz.sum((0, 2, 3)).to(wide),
    }
    return read, dw, dgamma


def apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(sum(shape))
    read, dw, dgamma = case(shape, dtype, device)
    with record_launches() as launches:
        ours, ours_gamma = frozen_grad(**read, dw_dtype=dtype, wants_dgamma=True)
    assert ours is not None and ours_gamma is not None
    assert ours.dtype == dtype and ours.stride() == read["weight"].stride() and ours_gamma.dtype == read["stats"].dtype
    assert apart(ours, dw) <= TOLERANCE[dtype]
    assert apart(ours_gamma, dgamma) <= max(TOLERANCE[read["stats"].dtype] * 10, 1e-12)
    tensors = (*read.values(), ours, ours_gamma)
    assert [(entry.kernel, entry.bytes) for entry in launches] == [
        ("frozen_grad_kernel", sum(t.nbytes for t in tensors))
    ]


def test_what_is_not_wanted_is_not_made(device: torch.device) -> None:
    read, dw, dgamma = case(SHAPES[1], torch.float32, device)
    alone, nothing = frozen_grad(**read, dw_dtype=torch.float32, wants_dgamma=False)
    assert nothing is None and alone is not None and apart(alone, dw) <= 2e-6
    nothing, alone = frozen_grad(**read, dw_dtype=None, wants_dgamma=True)
    assert nothing is None and alone is not None and apart(alone, dgamma) <= 2e-5
    with record_launches() as launches:
        assert frozen_grad(**read, dw_dtype=None, wants_dgamma=False) == (None, None)
    assert not launches


def test_t_of_16_bits(device: torch.device) -> None:
    """The vendor gives its weight gradient in the data's dtype."""
    read, _, _ = case(SHAPES[0], torch.bfloat16, device)
    read["t"] = read["t"].bfloat16()
    exact = read["t"].double() * read["stats"][2].double().view(-1, 1, 1, 1)
    dw, _ = frozen_grad(**read, dw_dtype=torch.float32, wants_dgamma=True)
    assert dw is not None and apart(dw, exact) <= 2e-7


def test_nan_stays_in_its_channel(device: torch.device) -> None:
    read, _, _ = case(SHAPES[1], torch.float32, device)
    read["t"][3, 2] = torch.nan
    dw, dgamma = frozen_grad(**read, dw_dtype=torch.float32, wants_dgamma=True)
    assert dw is not None and dgamma is not None
    assert dgamma.isnan().nonzero().flatten().tolist() == [3] and dw.isnan().sum() == 1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("t", lambda t: t[:2], "t must have shape"),
        ("weight", lambda t: t.contiguous().mT, "weight"),
        ("stats", lambda t: t.half(), "stats must be"),
        ("stats", lambda t: t[:3], "stats must have shape"),
        ("sum_dz", lambda t: t.double(), "sum_dz must be"),
        ("sum_dz", lambda t: t[:2], "sum_dz must have shape"),
    ],
)
def test_refusals(name, value, says, device) -> None:
    read, _, _ = case(SHAPES[0], torch.float32, device)
    read[name] = value(read[name])
    with pytest.raises(ValueError, match=says):
        frozen_grad(**read, dw_dtype=torch.float32, wants_dgamma=True)


def test_every_row_of_a_large_weight_has_a_program() -> None:
    """The steps of the widest rows of a ResNet, and narrow ones together."""
    wide, narrow = frozen_grad_config(512, 512 * 9), frozen_grad_config(256, 64)
    assert (wide.block_m, wide.block_c) == (1, 1024) and (narrow.block_m, narrow.block_c) == (16, 64)
