"""Autocast, GradScaler, and dtypes that meet in one block: eager's dtypes, and statistics that update."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import functional, reference
from fused_resnet.plan.target import INTERPRETER, Assumption, assume
from tests.conftest import INTERPRETED
from tests.modules.test_blocks import projection

pytestmark = [pytest.mark.quick, pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter")]

ROUNDING = {torch.float16: 2**-8, torch.bfloat16: 2**-5}


@pytest.fixture(autouse=True)
def bfloat16_too() -> Iterator[None]:
    """The tests' interpreter rounds bfloat16 as a GPU does; Triton's own, which the planner knows, does not."""
    with assume(Assumption(replace(INTERPRETER, dtypes=INTERPRETER.dtypes | {"bfloat16"}))):
        yield


def networks(**options: Any) -> list[nn.Module]:
    """Ours and the reference's: a stem, a projecting and an identity block, a basic block, a head."""
    nets = []
    for family in (fr, reference):
        torch.manual_seed(0)
        net = family.ResNet(family.Bottleneck, [2], width=8, num_classes=4, **options)
        nets.append(net.to(memory_format=torch.channels_last))
    nets[0].load_state_dict(nets[1].state_dict())
    return nets


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16).contiguous(memory_format=torch.channels_last)


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_autocast_of_a_network(dtype: torch.dtype, training: bool) -> None:
    """float32 parameters and gradients, 16-bit activations, running statistics that move as eager's do."""
    x, found = images(), []
    for net in networks():
        net.train(training)
        before = copy.deepcopy([bn.running_mean for bn in norms(net)])
        dtypes: list[torch.dtype] = []
        net.layer1[1].register_forward_hook(lambda m, i, out, dtypes=dtypes: dtypes.append(out.dtype))
        with torch.autocast("cpu", dtype=dtype), fr.record_launches() as launches:
            out = net(x)
        assert bool(launches) == isinstance(net, fr.ResNet)
        assert dtypes == [dtype]
        out.float().square().sum().backward()
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
        assert {b.dtype for bn in norms(net) for b in (bn.running_mean, bn.running_var)} == {torch.float32}
        assert all(torch.equal(bn.running_mean, mean) != training for bn, mean in zip(norms(net), before, strict=True))
        found.append([out.float(), *(b.float() for b in net.buffers()), net.fc.weight.grad])
    torch.testing.assert_close(*found, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


def test_autocast_is_left_and_entered_between_blocks() -> None:
    """float16 into a block outside of autocast is an error as in eager; float32 behind it works."""
    block = fr.Bottleneck(8, 2)
    with torch.autocast("cpu", dtype=torch.float16):
        half = block(torch.randn(2, 8, 4, 4).half())
    assert half.dtype == torch.float16
    with pytest.raises(TypeError, match="use autocast, or one dtype"):
        block(half)
    assert block(half.float()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", enabled=False):
        assert block(half.float()).dtype == torch.float32


def test_backward_outside_and_inside_of_autocast_are_the_same() -> None:
    x, grads = images(), []
    for inside in (True, False):
        net = networks()[0]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = net(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *grads))


# ---------------------------------------------------------------- GradScaler


def test_grad_scaler_trains_as_eager_does_and_skips_an_overflow() -> None:
    x, labels, found = images(), torch.tensor([0, 1, 2, 3]), []
    for net in networks():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses, scales = [], []
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.cross_entropy(net(x), labels)
            scaled = scaler.scale(loss)
            if step == 1:
                scaled = scaled * float("inf")
            scaled.backward()
            before = net.fc.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, net.fc.weight) == (step == 1), "an overflowing step is skipped"
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        assert scales == [1024.0, 512.0, 512.0]
        assert all(bn.num_batches_tracked == 3 for bn in norms(net)), "and counts a batch all the same"
        found.append(torch.tensor(losses))
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_an_overflow_inside_a_block_is_seen() -> None:
    """Infinite gradients leave a block as such, for the scaler to find."""
    block = fr.BasicBlock(8, 8)
    with torch.autocast("cpu", dtype=torch.float16):
        out = block(torch.randn(2, 8, 4, 4))
    (out.float().sum() * 2.0**127).backward()
    assert not all(p.grad.isfinite().all() for p in block.parameters())


# ---------------------------------------------------------------- dtypes that meet


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", ["given", "identity", "shortcut", "bn"])
def test_a_wider_residual_widens_the_output_as_in_eager(kind: str, training: bool) -> None:
    """float32 beside float16: the sum, and so the output, is float32, and no bit of the residual is lost."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    wide = torch.randn(2, 8, 5, 5)
    ours: nn.Module = fr.BasicBlock(8, 8).train(training)
    theirs: nn.Module = reference.BasicBlock(8, 8).train(training)
    if kind == "shortcut":  # one that leaves autocast
        for block in (ours, theirs):
            block.downsample = nn.Hardtanh(-9, 9)
    if kind == "bn":
        ours, theirs = fr.BNAddReLU(8).train(training), nn.BatchNorm2d(8).train(training)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for block in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in (x, wide)]
        with torch.autocast("cpu", dtype=torch.float16), fr.record_launches() as launches:
            if kind == "given":
                layers = [
                    (functional.conv_of(conv), functional.batch_norm_of(bn))
                    for conv, bn in ((block.conv1, block.bn1), (block.conv2, block.bn2))
                ]
                route = "auto" if block is ours else "reference"
                out = functional.basic_block(leaves[0], layers, residual=leaves[1], route=route)
            elif kind == "bn":
                y = leaves[0].half()
                out = block(y, leaves[1]) if block is ours else (block(y) + leaves[1]).relu()
            else:
                out = block(leaves[0])
        assert bool(launches) == (block is ours)
        assert out.dtype == torch.float32
        out.backward(torch.ones_like(out))
        found.append([out.detach(), *(t.grad for t in leaves if t.grad is not None)])
        assert all(t.grad is None or t.grad.dtype == torch.float32 for t in leaves)
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    if kind in ("given", "bn"):
        open_ = (found[0][0] > 0).float()
        assert torch.equal(found[0][-1], open_), "the residual's gradient is the mask itself"


def test_a_narrower_residual_does_not_narrow_the_output() -> None:
    bn, y, residual = fr.BNAddReLU(3), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4).half().requires_grad_()
    out = bn(y, residual)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, (nn.BatchNorm2d(3)(y) + residual).relu())
    out.sum().backward()
    assert residual.grad.dtype == torch.float16


@pytest.mark.parametrize("down", [True, False], ids=["projection", "identity"])
def test_autocast_leaves_a_16_bit_block_whole(down: bool) -> None:
    """What a network gives its blocks: nothing here is wide, and each block is one operation."""
    block = fr.Bottleneck(8, 2, 1, projection(8, 8) if down else None)
    with torch.autocast("cpu", dtype=torch.float16), fr.record_launches() as launches:
        out = block(torch.randn(2, 8, 4, 4).half())
    assert out.dtype == torch.float16
    assert [launch.kernel for launch in launches].count("bn_act_kernel") <= 2
