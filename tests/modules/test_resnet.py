"""The fused family is the reference family over other blocks: same keys, same seeds, same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fused_resnet import reference
from fused_resnet.modules import resnet as fused

quick = pytest.mark.quick

BUILDERS: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}),
    ("resnet34", {"shortcut": "A"}),
    ("resnet50", {"variant": "v1"}),
    ("resnet101", {"shortcut": "C"}),
    ("resnet152", {}),
    ("wide_resnet50_2", {}),
    ("wide_resnet101_2", {}),
    ("resnext50_32x4d", {}),
    ("resnext101_32x8d", {}),
    ("resnext101_64x4d", {}),
    ("plain", {"depth": 34}),
    ("plain", {"depth": 50}),
    ("cifar_resnet", {"depth": 20}),
    ("cifar_plain", {"depth": 20}),
]


@quick
@pytest.mark.parametrize(("name", "options"), BUILDERS)
def test_keys_shapes_and_geometry_are_the_references(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(fused, name)(**options), getattr(reference, name)(**options)
    keys = [[(key, value.shape) for key, value in net.state_dict().items()] for net in (ours, theirs)]
    assert keys[0] == keys[1]
    convs = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)]
    for a, b in zip(*convs, strict=True):
        assert (a.stride, a.padding, a.dilation, a.groups) == (b.stride, b.padding, b.dilation, b.groups)


@quick
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {"zero_init_residual": True}),
        ("cifar_resnet", {"depth": 8}),
        ("plain", {"depth": 18}),
    ],
)
def test_same_seed_same_weights(name: str, options: dict[str, Any]) -> None:
    states = []
    for builders in (fused, reference):
        torch.manual_seed(0)
        states.append(getattr(builders, name)(width=8, **options).state_dict())
    for key, value in states[1].items():
        assert torch.equal(states[0][key], value), key


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels follow PyTorch's switch: without tf32 both sides compute in full float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(reference, name)(**options)
    return getattr(fused, name)(weights=theirs.state_dict(), **options), theirs


@quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("small_input", [True, False])
def test_stem(training: bool, small_input: bool) -> None:
    ours, theirs = (net.train(training) for net in pair("resnet18", width=8, small_input=small_input))
    x = torch.randn(2, 3, 14, 12)
    torch.testing.assert_close(ours.stem(x), theirs.stem(x), rtol=1e-4, atol=1e-5)
    for key, value in theirs.bn1.state_dict().items():
        torch.testing.assert_close(ours.bn1.state_dict()[key], value, rtol=1e-4, atol=1e-6)


@quick
def test_stem_steps_aside_for_hooks_and_strangers() -> None:
    ours, theirs = pair("resnet18", width=8)
    x = torch.randn(2, 3, 14, 12)
    seen: list[str] = []
    ours.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    assert torch.equal(ours.stem(x), theirs.stem(x)) and seen == ["bn1"]

    ours, theirs = pair("resnet18", width=8)
    for net in (ours, theirs):
        net.maxpool = nn.AvgPool2d(2)
        net.conv1.dilation = (2, 2)
    torch.testing.assert_close(ours.stem(x), theirs.stem(x), rtol=1e-4, atol=1e-5)
    for net in (ours, theirs):
        net.bn1 = nn.GroupNorm(2, 8)
    assert torch.equal(ours.stem(x), theirs.stem(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet", {"depth": 8, "width": 8}),
        ("cifar_resnet", {"depth": 8, "width": 8, "shortcut": "B"}),
        ("cifar_plain", {"depth": 8, "width": 8}),
        ("cifar_resnet", {"depth": 8, "width": 8, "stochastic_depth_prob": 0.5}),
    ],
)
def test_small_networks_agree(name: str, options: dict[str, Any]) -> None:
    ours, theirs = (net.double() for net in pair(name, **options))  # no ReLU near zero decides otherwise
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    outs, grads = [], []
    for net in (ours, theirs):
        torch.manual_seed(0)
        outs.append(net(x))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [net.conv1.weight, net.fc.weight]))
    torch.testing.assert_close(*outs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
