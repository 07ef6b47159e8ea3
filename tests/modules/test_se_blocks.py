"""Blocks with squeeze and excitation: fused around it, equal to the plain ones and to timm's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import reference
from fused_resnet.reference.blocks import projection
from tests.conftest import INTERPRETED
from tests.eager import agree

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")

BLOCKS: dict[str, Callable[[Any], nn.Module]] = {
    "basic": lambda family: family.SEBasicBlock(12, 12),
    "basic, stride": lambda family: family.SEBasicBlock(12, 20, 2, projection(12, 20, 2, nn.BatchNorm2d)),
    "bottleneck": lambda family: family.SEBottleneck(12, 3, reduction=4),
    "bottleneck, stride": lambda family: family.SEBottleneck(12, 5, 2, projection(12, 20, 2, nn.BatchNorm2d)),
    "bottleneck, groups": lambda family: family.SEBottleneck(12, 3, groups=2, base_width=64),
}


def results(block: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    out = block(x)
    out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
    return {"out": out, "dx": x.grad, **{n: p.grad for n, p in block.named_parameters()}, **dict(block.named_buffers())}


def image() -> Tensor:
    return torch.randn(2, 12, 6, 6, dtype=torch.float64)


def drawn(block: nn.Module) -> nn.Module:
    block.double()
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return block


@quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_equal_to_the_reference(name: str, training: bool) -> None:
    theirs = drawn(BLOCKS[name](reference)).train(training)
    ours = BLOCKS[name](fr).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    x = image()
    with fr.record_launches() as launches:
        mine = results(ours, x)
    agree(mine, results(theirs, x))
    assert {launch.kernel for launch in launches} >= {"conv_fprop_kernel", "conv_wgrad_kernel"}
    for copied in copies:
        agree(results(copied, x), mine)


@quick
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_seed_gives_the_same_block(name: str) -> None:
    states = []
    for family in (fr, reference):
        torch.manual_seed(5)
        states.append(BLOCKS[name](family).state_dict())
    assert list(states[0]) == list(states[1])
    agree(*states, rtol=0.0, atol=0.0)


@quick
def test_excitation_by_hand() -> None:
    """Figure 2 of the paper: two fully connected layers on the channels' means."""
    se, x = reference.SqueezeExcitation(32, 4).double(), torch.randn(3, 32, 5, 4, dtype=torch.float64)
    hidden = (x.flatten(2).mean(2) @ se.fc1.weight[:, :, 0, 0].T + se.fc1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ se.fc2.weight[:, :, 0, 0].T + se.fc2.bias)))
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])
    assert hidden.shape == (3, 8)


@quick
def test_random_depth_and_what_edits_do() -> None:
    ours, theirs = fr.SEBottleneck(12, 3).double(), drawn(reference.SEBottleneck(12, 3))
    ours.load_state_dict(theirs.state_dict())
    ours.stochastic_depth_prob = theirs.stochastic_depth_prob = 0.5
    x = torch.randn(8, 12, 6, 6, dtype=torch.float64)
    agree(results(ours, x), results(theirs, x))
    seen: list[nn.Module] = []
    for block in (ours, theirs):
        block.se.register_forward_hook(lambda module, *_: seen.append(module))
        block.zero_grad()
    agree(results(ours, x), results(theirs, x))
    assert seen == [ours.se, theirs.se]
    traced = torch.fx.symbolic_trace(ours.eval())
    assert any(node.target == "se.fc1" for node in traced.graph.nodes)


@quick
@pytest.mark.parametrize("kind", ["SEBasicBlock", "SEBottleneck"])
def test_beside_timms(kind: str) -> None:
    """timm's meaning of the constructor, and its checkpoints in the block of torchvision's meaning."""
    models = pytest.importorskip("timm").models.resnet
    original = getattr(models, kind.removeprefix("SE"))
    planes = 64 // original.expansion
    torch.manual_seed(7)
    theirs = original(64, planes, attn_layer="se")
    torch.manual_seed(7)
    ours = getattr(fr, kind)(64, planes, drop_path=None)
    agree(ours.state_dict(), theirs.state_dict(), rtol=0.0, atol=0.0)
    assert isinstance(ours, original) and type(ours.se) is type(theirs.se)
    plain = getattr(fr, kind)(64, planes)
    plain.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    expected = results(theirs.double(), x)
    for block in (ours, plain):
        agree(results(block.double(), x), expected)
    assert isinstance(fr.fold(ours), original)


@quick
def test_a_network_and_its_explanation() -> None:
    net = fr.ResNet(fr.SEBottleneck, [1, 1], width=8, num_classes=3, small_input=True, zero_init_residual=True)
    plain = reference.ResNet(reference.SEBottleneck, [1, 1], width=8, num_classes=3, small_input=True)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    explanation = fr.explain(net, example_input=x, dtype=torch.float32)
    fused = [row for row in explanation.rows if row.source == "fused"]
    assert len(fused) >= 3
    with fr.use_route("reference"), torch.no_grad():
        torch.testing.assert_close(net.eval()(x), plain.eval()(x))
