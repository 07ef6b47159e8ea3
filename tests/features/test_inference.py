"""Evaluation without gradients: convolution, folded BatchNorm, ReLU and residual; nothing is touched, nothing kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.autograd import chain
from fused_resnet.autograd import stem as stem_op
from fused_resnet.plan.target import assume
from fused_resnet.reference.blocks import projection
from tests import numerics
from tests.conftest import INTERPRETED
from tests.whole_block import BFLOAT16_TOO

quick = pytest.mark.quick
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="the counts are those of the interpreter's plans"),
    pytest.mark.usefixtures("ieee"),
]

NCHW, NHWC = torch.contiguous_format, torch.channels_last
WITHOUT_GRADIENT = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def shortcut(ci: int, co: int, stride: int = 1) -> nn.Module:
    return projection(ci, co, stride, nn.BatchNorm2d)


CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ConvBNReLU": (lambda: fr.ConvBNReLU(16, 24, 3), 16, 1),
    "ConvBN": (lambda: fr.ConvBNReLU(16, 24, 1, relu=False), 16, 1),
    "BasicBlock": (lambda: fr.BasicBlock(16, 16), 16, 2),
    "BasicBlock, projection": (lambda: fr.BasicBlock(16, 24, 2, shortcut(16, 24, 2)), 16, 3),
    "Bottleneck": (lambda: fr.Bottleneck(32, 8), 32, 3),
    "Bottleneck, projection": (lambda: fr.Bottleneck(16, 8, 2, shortcut(16, 32, 2)), 16, 4),
}
"""A module in evaluation, its input's channels, and how many convolutions it has: each one is two launches."""


def made(name: str, memory_format: torch.memory_format = NHWC) -> tuple[nn.Module, Tensor, int]:
    make, channels, convs = CASES[name]
    block = make().eval().to(memory_format=memory_format)  # type: ignore[call-overload]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low in ((module.weight, 0.6), (module.bias, -0.2), (module.running_mean, -0.2)):
                t.data.uniform_(low, low + 0.4)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.7, 1.3)  # type: ignore[union-attr, operator]
    return block, torch.randn(2, channels, 13, 11).contiguous(memory_format=memory_format), convs


def state(block: nn.Module) -> dict[str, Any]:
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: (t.data_ptr(), t._version, t.requires_grad, t.grad, t.tolist()) for name, t in tensors.items()}


@quick
@pytest.mark.parametrize("without_gradient", WITHOUT_GRADIENT)
@pytest.mark.parametrize("name", CASES)
def test_a_launch_for_each_convolution_and_nothing_touched(name: str, without_gradient: str) -> None:
    """All BatchNorms' scale and shift, then each convolution, in whose epilogue everything else is; explain agrees."""
    block, x, convs = made(name)
    before, image = state(block), x.clone()
    with WITHOUT_GRADIENT[without_gradient](), fr.record_launches() as launches:
        out = block(x)
    assert Counter(launch.kernel for launch in launches) == {"bn_frozen_kernel": 1, "conv_fprop_kernel": convs}
    assert state(block) == before and torch.equal(x, image)
    assert not out.requires_grad and out.grad_fn is None

    explanation = fr.explain(block, example_input=x, dtype=torch.float32, training=False)
    assert state(block) == before
    assert explanation.saved_bytes == 0
    assert (explanation.launches, explanation.flops, explanation.bytes) == (
        len(launches),
        sum(launch.flops for launch in launches),
        sum(launch.bytes for launch in launches),
    )
    with torch.no_grad(), fr.use_route("reference"):
        torch.testing.assert_close(out, block(x), rtol=1e-4, atol=1e-5)


@quick
@pytest.mark.parametrize("name", [*CASES, "Stem"])
def test_operators_give_the_output_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward would read, ReLU masks, statistics and activations, is empty; with a gradient it is not."""
    block, x, _ = made(name) if name != "Stem" else (fr.Stem(3, 8).eval(), torch.randn(1, 3, 12, 12), 1)
    others: list[int] = []

    def watch(module: Any, operator: str) -> None:
        original = getattr(module, operator)

        def watched(*arguments: Any) -> tuple[Tensor, ...]:
            out, *rest = original(*arguments)
            others.append(sum(t.numel() for t in rest))
            return (out, *rest)

        monkeypatch.setattr(module, operator, watched)

    watch(chain, "chain_forward")
    watch(stem_op, "stem_forward")
    for without_gradient in WITHOUT_GRADIENT.values():
        with without_gradient():
            block(x)
    assert others == [0, 0]
    block(x)
    assert others[-1] > 0


@quick
def test_a_frozen_model_keeps_nothing_with_gradients_enabled_either() -> None:
    """What decides is whether anything asks for a gradient: parameters frozen as for a feature extractor do not."""
    block, x, _ = made("Bottleneck")
    block.requires_grad_(False)
    with fr.record_launches() as launches:
        assert block(x).grad_fn is None
    assert not any("bits" in launch.kernel for launch in launches) and len(launches) == 4


@quick
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_rule(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """A 16-bit model, BatchNorms in float32: no further from float64 than eager; bfloat16 by the strict interpreter."""
    block, x, _ = made(name, memory_format)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    x = x.to(dtype)
    assumed: AbstractContextManager[Any] = assume(BFLOAT16_TOO)
    with torch.inference_mode(), assumed, fr.use_route("staged", strict=True), fr.record_launches() as launches:
        out = block(x)
    assert launches and out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
    with torch.no_grad(), fr.use_route("reference"):
        eager, oracle = block(x), copy.deepcopy(block).double()(x.double())
    numerics.check(out, eager, oracle, "z")


@quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_the_weights_of_a_block_by_one_launch(dtype: torch.dtype) -> None:
    block, x, convs = made("Bottleneck, projection")
    with torch.inference_mode(), torch.autocast("cpu", dtype), assume(BFLOAT16_TOO), fr.record_launches() as launches:
        out = block(x)
    assert out.dtype == dtype
    assert Counter(launch.kernel for launch in launches) == {
        "cast_kernel": 1,
        "bn_frozen_kernel": 1,
        "conv_fprop_kernel": convs,
    }


@quick
def test_edits_between_two_calls_count() -> None:
    """Nothing of a parameter or buffer is remembered from call to call, by whichever way it is edited."""
    block, x, _ = made("Bottleneck")
    edits: list[Callable[[Any], object]] = [
        lambda b: b.conv2.weight.data.mul_(0.5),
        lambda b: b.bn1.running_var.data.mul_(2.0),
        lambda b: b.bn2.running_mean.numpy().fill(0.3),
        lambda b: setattr(b.bn3, "eps", 0.1),
        lambda b: b.load_state_dict({n: t * 0.9 for n, t in b.state_dict().items() if t.is_floating_point()}, False),
    ]
    for edit in [lambda b: None, *edits]:
        edit(block)
        with torch.inference_mode():
            out = block(x)
            with fr.use_route("reference"):
                torch.testing.assert_close(out, block(x), rtol=1e-4, atol=1e-5)
