"""The stem's operator against conv, BN, ReLU and max pooling of PyTorch in float64."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.autograd import stem as op
from fused_resnet.plan import planner
from tests.conftest import INTERPRETED
from tests.eager import Pair, mixing, pair

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def eager(x: Tensor, layer: Pair) -> Tensor:
    return nn.functional.max_pool2d(layer[1](layer[0](x)).relu(), 3, 2, 1)


def fused(x: Tensor, layer: Pair) -> Tensor:
    conv, bn = layer
    record = fr.functional.batch_norm_of(bn)
    return fr.functional.stem(x, conv.weight, record, stride=conv.stride, padding=conv.padding, route="staged")


def compare(x: Tensor, layer: Pair, wanted: list[int] | None = None) -> None:
    results, dout = [], None
    for run, (conv, bn) in zip((fused, eager), (layer, copy.deepcopy(layer)), strict=True):
        out = run(x, (conv, bn))
        dout = torch.randn_like(out) if dout is None else dout
        inputs = [t for t in (x, conv.weight, bn.weight, bn.bias) if t is not None and t.requires_grad]
        results.append([out, *torch.autograd.grad(out, inputs, dout), *bn.buffers()])
    torch.testing.assert_close(*results)


@quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((14, 11), 7, {"stride": 2, "padding": 3}),
        ((7, 6), 3, {"padding": 1}),
        ((9, 8), 5, {"stride": (1, 2), "padding": (2, 0)}),
        ((5, 5), 1, {}),
        ((2, 2), 3, {"stride": 2, "padding": 1}),
    ],
)
def test_against_eager(size: tuple[int, int], kernel: int, options: dict[str, Any], training: bool) -> None:
    compare(image(2, 3, *size), pair(3, 5, kernel, training=training, **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("passes", [*itertools.product([True, False], repeat=3)][:-1])
def test_vendor_and_fused_mix(passes: tuple[bool, ...], training: bool) -> None:
    vendor = {kind for kind, by_vendor in zip(("fprop", "dgrad", "wgrad"), passes, strict=True) if by_vendor}
    with mixing(lambda _, kind: kind in vendor):
        compare(image(2, 3, 9, 8), pair(3, 5, 3, stride=2, padding=1, training=training))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norm_variants(options: dict[str, Any]) -> None:
    compare(image(2, 3, 9, 8), pair(3, 5, 3, **options))


@quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [*itertools.product([True, False], repeat=3)][:-1])
def test_needs(wanted: tuple[bool, ...], training: bool) -> None:
    x, (conv, bn) = image(2, 3, 9, 8), pair(3, 5, 3, training=training)
    x.requires_grad_(wanted[0])
    conv.weight.requires_grad_(wanted[1])
    bn.requires_grad_(wanted[2])
    compare(x, (conv, bn))
    out = fused(x, (conv, bn))
    with fr.record_launches() as launches:
        out.backward(torch.ones_like(out))
    ran = Counter(launch.kernel.removesuffix("_kernel") for launch in launches)
    assert (ran["conv_dgrad"], ran["stem_conv_wgrad"]) == wanted[:2]
    assert ran["stem_pool_grad_apply"] == (wanted[0] or wanted[1])


def test_ties_of_the_pooling_are_broken_as_in_eager() -> None:
    x = torch.randint(0, 2, (2, 3, 9, 8)).double().requires_grad_()
    conv, bn = pair(3, 4, 1)
    conv.weight.data.fill_(1.0)
    compare(x, (conv, bn))


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool) -> None:
    x, (conv, bn) = image(1, 2, 6, 5), pair(2, 3, 3, padding=1, training=training)
    run = lambda *_: fused(x, (conv, bn))  # noqa: E731
    assert torch.autograd.gradcheck(run, [x, conv.weight, bn.weight, bn.bias], fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_saved_tensors(training: bool) -> None:
    x, (conv, bn) = image(2, 4, 8, 8), pair(4, 6, 3, padding=1, training=training)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        pooled = fused(x, (conv, bn)).numel()
    assert sorted(saved) == sorted([x.numel(), conv.weight.numel(), 6, 6, 24, 4 * pooled, pooled, pooled])


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool, optional: bool) -> None:
    x, (conv, bn) = image(2, 3, 6, 5).detach().contiguous(memory_format=torch.channels_last), pair(3, 4, 3)
    geometry = ((4, 3, 3, (1, 1), (0, 0), (1, 1), 1),)
    shape = (2, 3, 6, 5)
    text, *_ = planner.chain_plan_text(
        x.device, "float64", shape, geometry, None, "none", True, training, True, "staged"
    )
    weight = conv.weight.detach()
    mean, var = (bn.running_mean, bn.running_var) if optional or not training else (None, None)
    gamma, beta = (bn.weight.detach(), bn.bias.detach()) if optional else (None, None)
    counter = torch.tensor(3) if optional and training else None
    torch.library.opcheck(
        torch.ops.fused_resnet.stem_forward.default, (text, x, weight, gamma, beta, mean, var, counter, 0.1, 1e-5)
    )
    out, y, index, stats = op.stem_forward(text, x, weight, gamma, beta, mean, var, counter, 0.1, 1e-5)
    dout = torch.randn_like(out)
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(
            torch.ops.fused_resnet.stem_backward.default,
            (text, *needs, dout, x, weight, gamma, beta, y, out, index, stats),
        )
