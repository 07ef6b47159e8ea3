"""The residual blocks against the reference's, and what makes them step aside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_resnet as fr
from fused_resnet import reference
from tests.conftest import INTERPRETED
from tests.eager import agree

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


def projection(ci: int, co: int, stride: int = 1, kernel: int = 1, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(ci, co, kernel, stride, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(co))


BLOCKS: dict[str, Callable[[Any], nn.Module]] = {
    "basic": lambda family: family.BasicBlock(6, 6),
    "basic, stride": lambda family: family.BasicBlock(6, 5, 2, projection(6, 5, 2)),
    "basic, shortcut A": lambda family: family.BasicBlock(6, 8, 2, reference.blocks.ZeroPadShortcut(6, 8, 2)),
    "basic, pooled": lambda family: family.BasicBlock(6, 5, 2, nn.Sequential(nn.AvgPool2d(2), *projection(6, 5))),
    "bottleneck": lambda family: family.Bottleneck(12, 3),
    "bottleneck, stride": lambda family: family.Bottleneck(6, 3, 2, projection(6, 12, 2)),
    "bottleneck, groups": lambda family: family.Bottleneck(12, 3, groups=2, base_width=64),
    "bottleneck, wide": lambda family: family.Bottleneck(12, 3, base_width=128),
    "bottleneck, dilated": lambda family: family.Bottleneck(12, 3, dilation=2),
    "bottleneck, 3x3 shortcut": lambda family: family.Bottleneck(6, 3, 2, projection(6, 12, 2, 3, padding=1)),
    "bottleneck, biased shortcut": lambda family: family.Bottleneck(
        6, 3, 2, nn.Sequential(nn.Conv2d(6, 12, 1, 2), nn.BatchNorm2d(12))
    ),
    "bottleneck, other norm": lambda family: family.Bottleneck(12, 3, norm_layer=lambda c: nn.GroupNorm(1, c)),
}


def twins(make: Callable[[Any], nn.Module]) -> tuple[nn.Module, nn.Module]:
    ours, theirs = make(fr).double(), make(reference).double()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    for name, b in theirs.named_buffers():
        if "running_var" in name:
            b.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(block: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(4)
    out.backward(torch.randn_like(out))
    found: dict[str, Tensor | None] = {"out": out, "dx": x.grad}
    return found | {n: p.grad for n, p in block.named_parameters()} | dict(block.named_buffers())


def same_as_reference(ours: nn.Module, theirs: nn.Module, channels: int = 12, fused: bool | None = None) -> None:
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    with fr.record_launches() as launches:
        mine = results(ours, x)
    agree(mine, results(theirs, x))
    assert fused is None or fused == bool(launches)


@quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_the_reference(name: str, training: bool) -> None:
    ours, theirs = (b.train(training) for b in twins(BLOCKS[name]))
    channels = 12 if hasattr(ours, "conv3") and ours.conv1.in_channels == 12 else 6
    same_as_reference(ours, theirs, channels, fused="norm" not in name)


@quick
def test_a_projection_joins_the_operation_and_another_shortcut_is_one_of_its_own(monkeypatch) -> None:
    operations = []

    def counted(*arguments: object, **keywords: object) -> Tensor:
        operations.append(arguments)
        return chain(*arguments, **keywords)

    chain = fr.functional.conv_bn_chain
    monkeypatch.setattr(fr.functional, "conv_bn_chain", counted)
    for kernel, expected in ((1, 1), (3, 2)):
        operations.clear()
        block = fr.Bottleneck(6, 5, 2, projection(6, 20, 2, kernel, padding=kernel // 2))
        block.double().eval().to(memory_format=torch.channels_last)
        with torch.no_grad(), fr.record_launches() as launches:
            block(torch.randn(2, 6, 6, 6, dtype=torch.float64))
        assert len(operations) == expected
        assert [launch.kernel for launch in launches].count("conv_fprop_kernel") == 4


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Halved(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def replaced_forward(m: nn.Module) -> None:
    original = m.forward
    m.forward = lambda x: original(x) * 0.5  # type: ignore[method-assign]


def backward_hook(block: nn.Module) -> None:
    block.relu.inplace = False  # PyTorch allows no edit in place of what such a hook has seen
    block.bn1.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


def subclassed(block: nn.Module) -> None:
    block.bn1 = copy.deepcopy(block.bn1)
    block.bn1.__class__ = Halved


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda b: b.conv2.register_forward_hook(lambda m, i, out: out * 0.5),
    "pre-hook": lambda b: b.bn2.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "backward hook": backward_hook,
    "backward pre-hook": lambda b: b.conv3.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),
    "hook on the ReLU": lambda b: b.relu.register_forward_hook(lambda m, i, out: out * 0.5),
    "hook on the shortcut": lambda b: b.downsample.register_forward_hook(lambda m, i, out: out * 0.5),
    "hook in the shortcut": lambda b: b.downsample[1].register_forward_hook(lambda m, i, out: out * 0.5),
    "pruning": lambda b: prune.l1_unstructured(b.conv2, "weight", amount=0.5),
    "parametrisation": lambda b: parametrize.register_parametrization(b.conv1, "weight", Doubled()),
    "replaced forward": lambda b: replaced_forward(b.bn3),
    "subclass": subclassed,
    "bias": lambda b: setattr(b, "conv2", nn.Conv2d(3, 3, 3, padding=1).double()),
    "circular padding": lambda b: setattr(b.conv2, "padding_mode", "circular"),
    "a number for a stride": lambda b: setattr(b.conv2, "stride", 1),
    "a list for a padding": lambda b: setattr(b.conv2, "padding", [1, 1]),
    "one number of a dilation": lambda b: setattr(b.conv2, "dilation", (1,)),
    "other activation": lambda b: setattr(b, "relu", nn.SiLU()),
    "identity for a norm": lambda b: setattr(b, "bn1", nn.Identity()),
}


@quick
@pytest.mark.parametrize("name", EDITS)
def test_touched_children_are_called(name: str) -> None:
    """An edit of a child means to our block what it means to the family's."""
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3, 1, projection(12, 12)))
    for block in (ours, theirs):
        torch.manual_seed(5)
        EDITS[name](block)
    if name == "circular padding":  # nn.Conv2d works this out in its constructor
        for block in (ours, theirs):
            block.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    elsewhere = "shortcut" in name or name in ("hook on the ReLU", "other activation")
    same_as_reference(ours, theirs, fused=elsewhere)  # the layers around it are fused all the same


@quick
def test_hooks_on_the_block_itself_do_not_unfuse_it_and_removed_ones_are_forgotten() -> None:
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    handles = [b.conv1.register_forward_hook(lambda m, i, out: out * 0.5) for b in (ours, theirs)]
    for handle in handles:
        handle.remove()
    for b in (ours, theirs):
        b.register_forward_hook(lambda m, i, out: out * 0.5)
    same_as_reference(ours, theirs, fused=True)


def test_stochastic_depth_drops_the_fused_branch_in_training_only() -> None:
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    ours.stochastic_depth_prob = theirs.stochastic_depth_prob = 0.5
    same_as_reference(ours, theirs, fused=True)
    same_as_reference(ours.eval(), theirs.eval(), fused=True)


def test_fx_traces_the_familys_own_forward() -> None:
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    traced = torch.fx.symbolic_trace(ours)
    assert {"conv1", "bn3"} <= {str(node.target) for node in traced.graph.nodes}
    same_as_reference(traced, theirs, fused=False)


def test_sync_batch_norm_conversion_without_a_group_is_batch_norm() -> None:
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours.bn1) is nn.SyncBatchNorm
    same_as_reference(ours, theirs)
    same_as_reference(ours.eval(), theirs.eval())


@quick
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = twins(lambda family: family.Bottleneck(6, 3, 2, projection(6, 12, 2)))
    twin = copied(ours)
    assert type(twin) is fr.Bottleneck
    same_as_reference(twin, theirs, 6, fused=True)
    assert all(p.grad is None for p in ours.parameters())


@quick
def test_old_checkpoints_without_counters_load() -> None:
    ours, theirs = twins(lambda family: family.BasicBlock(6, 6))
    state = {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}
    for name in (k for k in theirs.state_dict() if k.endswith("running_mean")):
        assert name in state
    del state["bn1.running_mean"]
    with pytest.raises(RuntimeError, match=r"bn1\.running_mean"):
        ours.load_state_dict(state)
    old = theirs.state_dict()
    for key in [k for k in old if "num_batches" in k]:
        del old[key]
    old._metadata = {k: {"version": 1} for k in old._metadata}
    ours.load_state_dict(old)
    same_as_reference(ours, theirs, 6)


def test_functional_call_and_vectorised_parameters() -> None:
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    x, names = torch.randn(2, 12, 5, 5, dtype=torch.float64), [n for n, _ in ours.named_parameters()]
    outs = []
    for block in (ours, theirs):
        torch.manual_seed(0)
        state = {n: torch.rand_like(t).requires_grad_() for n, t in block.named_parameters()}
        buffers = {n: torch.rand_like(t) if t.is_floating_point() else t.clone() for n, t in block.named_buffers()}
        before = copy.deepcopy(block.state_dict())
        out = torch.func.functional_call(block, (state, buffers), (x,))
        outs.append([out, *torch.autograd.grad(out.square().sum(), [state[n] for n in names]), *buffers.values()])
        assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    torch.testing.assert_close(*outs)


@quick
@pytest.mark.parametrize("name", ["Bottleneck", "BasicBlock"])
def test_torchvisions_state_and_seeds(name: str) -> None:
    vision = pytest.importorskip("torchvision.models.resnet")
    for arguments in ((8, 2), (8, 8, 1), (6, 8, 2)):
        blocks = []
        for block in (getattr(fr, name), getattr(vision, name)):
            torch.manual_seed(0)
            ci, planes, stride = (*arguments, 1)[:3]
            co = planes * block.expansion
            blocks.append(block(ci, planes, stride, None if (ci, stride) == (co, 1) else projection(ci, co, stride)))
        ours, theirs = blocks
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        same_as_reference(ours.double(), theirs.double(), arguments[0], fused=True)
