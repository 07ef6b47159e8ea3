"""Whole networks, narrow and on small images, against the reference in float64: forward, gradients, statistics, SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import reference
from tests.conftest import INTERPRETED
from tests.eager import mixing

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
    "resnet50 v1": ("resnet50", {"variant": "v1", "small_input": True, "shortcut": "C"}),
    "resnext50": ("resnext50_32x4d", {}),
}


def build(name: str, stages: int = 4, blocks: int = 1, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our network and the reference's, with the same drawn weights; ``blocks`` in each of ``stages``."""
    nets = []
    for family in (fr, reference):
        block = family.BasicBlock if name == "resnet18" else family.Bottleneck
        if name == "resnext50_32x4d":
            options |= {"groups": 4, "width_per_group": 32}
        torch.manual_seed(0)
        nets.append(family.ResNet(block, [blocks] * stages, width=8, num_classes=5, **options).double())
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        p.data += 0.1 * torch.randn_like(p)
        q.data.copy_(p.data)
    return nets[0], nets[1]


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = expected.double().abs().max().item()
        torch.testing.assert_close(
            ours[name], expected, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_every_gradient_and_the_statistics(name: str) -> None:
    builder, options = NETWORKS[name]
    ours, theirs = build(builder, blocks=2 if name == "resnet18" else 1, **options)
    x, target = images(size=16 if options.get("small_input") else 32), torch.tensor([1, 4])
    outs = []
    for net in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with fr.record_launches() as launches:
            out = net(leaf)
        assert bool(launches) == (net is ours)
        nn.functional.cross_entropy(out, target).backward()
        outs.append({"out": out, "dx": leaf.grad})
    close(*outs)
    close(gradients(ours), gradients(theirs))
    close(ours.state_dict(), theirs.state_dict())
    with torch.no_grad():
        close({"eval": ours.eval()(x)}, {"eval": theirs.eval()(x)})


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_steps_of_sgd(name: str) -> None:
    """Momentum, weight decay and Nesterov; three batches; the vendor's 3x3 convs among ours, as on a GPU."""
    ours, theirs = build(name, stages=2)
    x, losses = images(4), []
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
        losses.append([])
        for step in range(3):
            optimizer.zero_grad()
            with mixing(lambda i, kind: i == 1 or kind == "wgrad"):
                loss = nn.functional.cross_entropy(net(x + step), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses)
    close(ours.state_dict(), theirs.state_dict(), rtol=1e-5)


def test_channels_last_stays_channels_last_and_changes_nothing() -> None:
    ours, theirs = build("resnet50", stages=2)
    ours.to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    for block in (ours.layer1[0], ours.layer2[0]):
        block.register_forward_hook(lambda m, i, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
    (ours(x).square().sum()).backward()
    (theirs(x).square().sum()).backward()
    assert seen == [True, True]
    close(gradients(ours), gradients(theirs))
    close(ours.state_dict(), theirs.state_dict())


def test_fine_tuning_with_frozen_layers_and_frozen_statistics() -> None:
    """The first stage frozen, all BN in eval mode, the head trained: what is not asked for does not run."""
    ours, theirs = build("resnet50", stages=2)
    x = images()
    for net in (ours, theirs):
        net.eval()
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(("layer2.0.conv3", "layer2.0.bn3", "fc")))
        out = net(x)
        with fr.record_launches() as launches:
            out.square().sum().backward()
        if net is ours:
            kernels = [launch.kernel for launch in launches]
            assert kernels.count("conv_wgrad_kernel") == 1 and "conv_dgrad_kernel" not in kernels
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
