"""ConvBNReLU, BNAddReLU and Stem as modules: constructors, state, modes, stepping aside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import reference
from tests.conftest import INTERPRETED

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def launched(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, bool]:
    with fr.record_launches() as launches:
        out = module(*inputs)
    return out, bool(launches)


@quick
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 0},
        {"kernel_size": 5, "dilation": 2},
        {"kernel_size": 1, "relu": False, "momentum": None},
        {"kernel_size": 3, "groups": 2, "eps": 1e-3, "momentum": 0.5},
    ],
)
def test_conv_bn_relu(arguments: dict) -> None:
    ours, theirs = (family.ConvBNReLU(4, 6, **arguments).double() for family in (fr, reference))
    ours.load_state_dict(theirs.state_dict())
    x = image(2, 4, 9, 9)
    for training in (True, False):
        out, fused = launched(ours.train(training), x)
        torch.testing.assert_close(out, theirs.train(training)(x))
        assert fused
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@quick
def test_momentum_eps_and_relu_are_read_at_call_time() -> None:
    ours, theirs = fr.ConvBNReLU(4, 6, 3).double(), reference.ConvBNReLU(4, 6, 3).double()
    ours.load_state_dict(theirs.state_dict())
    for momentum, eps, relu in ((0.5, 1e-2, True), (None, 1e-5, False), (0.0, 1.0, True)):
        for module in (ours, theirs):
            module.bn.momentum, module.bn.eps, module.relu = momentum, eps, relu
        x = image(2, 4, 5, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@quick
def test_conv_bn_relu_steps_aside() -> None:
    for edit in (
        lambda m: m.conv.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "bn", nn.Identity()),
        lambda m: setattr(m, "conv", nn.Conv2d(4, 6, 3, padding="same", bias=False).double()),
        lambda m: setattr(m, "conv", nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False).double()),
        lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    ):
        module = fr.ConvBNReLU(4, 6, 3).double()
        edit(module)
        x = image(2, 4, 5, 5)
        out, fused = launched(module, x)
        assert not fused
        torch.testing.assert_close(out, module.bn(module.conv(x)).relu())


@quick
@pytest.mark.parametrize("training", [True, False])
def test_bn_add_relu(training: bool) -> None:
    ours, theirs = fr.BNAddReLU(4).double(), nn.BatchNorm2d(4).double()
    theirs.weight.data.uniform_()
    ours.load_state_dict(theirs.state_dict())
    y, residual = image(2, 4, 5, 5), image(2, 4, 5, 5)
    out, fused = launched(ours.train(training), y, residual)
    assert fused
    torch.testing.assert_close(out, (theirs.train(training)(y) + residual).relu())
    torch.testing.assert_close(ours(y), theirs(y).relu())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@quick
def test_stem() -> None:
    ours = fr.Stem(3, 8).double()
    theirs = nn.Sequential(copy.deepcopy(ours.conv1), copy.deepcopy(ours.bn1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    for size in ((16, 16), (13, 11), (7, 7)):
        out, fused = launched(ours, image(2, 3, *size).fill_(0) + torch.arange(size[1]).double())
        torch.testing.assert_close(out, theirs(image(2, 3, *size).fill_(0) + torch.arange(size[1]).double()))
        assert fused
    torch.testing.assert_close(ours.bn1.state_dict(), theirs[1].state_dict())
    for edit, layer_is_fused in (
        (lambda m: m.bn1.register_forward_hook(lambda *_: None), False),
        (lambda m: setattr(m.conv1, "dilation", (2, 2)), True),
        (lambda m: setattr(m, "conv1", nn.Conv2d(3, 8, 7, 2, 3).double()), False),
    ):
        stem = copy.deepcopy(ours)
        edit(stem)
        x = image(2, 3, 20, 20)
        out, fused = launched(stem, x)
        assert fused == layer_is_fused
        torch.testing.assert_close(out, theirs[3](stem.bn1(stem.conv1(x)).relu()), check_stride=False)


@quick
@pytest.mark.parametrize("make", [lambda: fr.ConvBNReLU(3, 4, 3), lambda: fr.Stem(3, 4), lambda: fr.BNAddReLU(3)])
def test_copies_and_dtypes(make) -> None:
    module = make().double()
    x = image(2, 3, 8, 8)
    out = copy.deepcopy(module)(x)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), out)
    low, fused = launched(copy.deepcopy(module).float(), x.float())
    assert fused
    torch.testing.assert_close(low.double(), out, rtol=1e-3, atol=1e-3)
    low, fused = launched(module.half(), x.half())
    assert fused and low.dtype == torch.float16
    torch.testing.assert_close(low.double(), out, rtol=2e-2, atol=2e-2)


@quick
def test_reprs_name_the_layers() -> None:
    assert "Conv2d" in repr(fr.ConvBNReLU(3, 4, 3)) and "BNAddReLU(5" in repr(fr.BNAddReLU(5))
