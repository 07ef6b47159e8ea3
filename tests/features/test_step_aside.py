"""Whoever expects a block's children to be called is obeyed, and whatever is edited after construction counts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, prune

import fused_resnet as fr
from fused_resnet import reference
from tests.conftest import INTERPRETED
from tests.modules.test_blocks import projection, results, same_as_reference, twins

pytestmark = [pytest.mark.quick, pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")]

BLOCKS: dict[str, Callable[[Any], nn.Module]] = {
    "basic": lambda family: family.BasicBlock(12, 12),
    "bottleneck": lambda family: family.Bottleneck(12, 3, 1, projection(12, 12)),
}


# ---------------------------------------------------------------- hooks for every module there is


@contextmanager
def registered(register: Callable[[Any], Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def halve_convs(module: nn.Module, _inputs: Any, out: Tensor) -> Tensor | None:
    return out / 2 if isinstance(module, nn.Conv2d) else None


def shift_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    return (inputs[0] + 1,) if isinstance(module, nn.BatchNorm2d) else None


def double_gradients(module: nn.Module, grads: tuple[Tensor | None, ...], _out: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in grads) if isinstance(module, nn.Conv2d) else None


GLOBAL_HOOKS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "forward": (every_module.register_module_forward_hook, halve_convs),
    "forward pre": (every_module.register_module_forward_pre_hook, shift_norms),
    "backward": (every_module.register_module_full_backward_hook, double_gradients),
}


@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_global_hooks_see_every_child(kind: str, hook: str) -> None:
    ours, theirs = twins(BLOCKS[kind])
    ours.relu.inplace = theirs.relu.inplace = False
    with registered(*GLOBAL_HOOKS[hook]):
        same_as_reference(ours, theirs, fused=False)
    same_as_reference(ours, theirs, fused=True)


def test_global_backward_pre_hooks_see_every_child() -> None:
    seen: list[str] = []
    block = fr.Bottleneck(12, 3)
    block.relu.inplace = False
    with registered(every_module.register_module_full_backward_pre_hook, lambda m, g: seen.append(type(m).__name__)):
        block(torch.randn(2, 12, 4, 4, requires_grad=True)).sum().backward()
    assert seen.count("Conv2d") == 3 and seen.count("BatchNorm2d") == 3


def test_counting_flops_counts_a_blocks_children() -> None:
    """PyTorch's counter follows modules by global hooks: it finds what eager PyTorch computes."""
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for family in (fr, reference):
        block = family.Bottleneck(12, 3)
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(2, 12, 4, 4)).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_layers_obey_global_hooks() -> None:
    convs, stems = [(f.ConvBNReLU(3, 5, 3).double(), 6) for f in (fr, reference)], fr.Stem(3, 4).double()
    convs[0][0].load_state_dict(convs[1][0].state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with registered(*GLOBAL_HOOKS["forward"]), fr.record_launches() as launches:
        torch.testing.assert_close(convs[0][0](x), convs[1][0](x))
        stems(x)
    assert not launches


# ---------------------------------------------------------------- hooks on children and on the block


def test_forward_and_full_backward_hooks_of_the_block_itself() -> None:
    """A hook on the block sees the block's input, output and gradients, and the block stays fused."""
    ours, theirs = twins(BLOCKS["bottleneck"])
    seen: list[list[Any]] = [[], []]
    for block, log in zip((ours, theirs), seen, strict=True):
        block.register_forward_pre_hook(lambda m, i, log=log: log.append(i[0].detach()))
        block.register_forward_hook(lambda m, i, out, log=log: log.append(out.detach()))
        block.register_full_backward_hook(lambda m, gi, go, log=log: log.extend([gi[0], go[0]]))
    same_as_reference(ours, theirs, fused=True)
    torch.testing.assert_close(*seen)


def test_removing_the_last_watcher_fuses_again() -> None:
    ours, theirs = twins(BLOCKS["bottleneck"])
    for block in (ours, theirs):
        prune.l1_unstructured(block.conv2, "weight", amount=0.5)
    same_as_reference(ours, theirs, fused=False)
    for block in (ours, theirs):
        prune.remove(block.conv2, "weight")
        block.zero_grad()
    same_as_reference(ours, theirs, fused=True)


def test_spectral_norm_of_a_child() -> None:
    """A parametrisation with a state of its own, that a forward changes."""
    ours, theirs = twins(BLOCKS["basic"])
    for block in (ours, theirs):
        torch.manual_seed(3)
        parametrizations.spectral_norm(block.conv1)
    same_as_reference(ours, theirs, fused=False)


# ---------------------------------------------------------------- edits after construction


def narrower(block: nn.Module) -> None:
    """What a search over widths does: the middle channels, by slices of the parameters."""
    block.conv1.weight.data = block.conv1.weight.data[:2].clone()
    block.conv2.weight.data = block.conv2.weight.data[:2, :2].clone()
    block.conv3.weight.data = block.conv3.weight.data[:, :2].clone()
    for bn in (block.bn1, block.bn2):
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(bn, name).data = getattr(bn, name).data[:2].clone()


def dilated(block: nn.Module) -> None:
    """The atrous edit of segmentation code: no stride, a wider filter."""
    block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (2, 2), (2, 2)


def untracked(block: nn.Module) -> None:
    block.bn2.running_mean = block.bn2.running_var = block.bn2.num_batches_tracked = None
    block.bn2.track_running_stats = False


def strided(block: nn.Module) -> None:
    block.conv2.stride = (2, 2)
    block.downsample[0].stride = (2, 2)


def caffe(block: nn.Module) -> None:
    """The stride where caffe had it: on the first 1x1."""
    block.conv1.stride = (2, 2)
    block.downsample[0].stride = (2, 2)


def grouped(block: nn.Module) -> None:
    block.conv2.groups = 3
    block.conv2.weight = nn.Parameter(block.conv2.weight.data[:, :1].clone())


def biased(block: nn.Module) -> None:
    block.conv3.bias = nn.Parameter(torch.linspace(-1, 1, 12).double())


def eps_and_momentum(block: nn.Module) -> None:
    block.bn1.eps, block.bn2.momentum, block.bn3.momentum = 0.1, 0.7, None


def uneven_padding(block: nn.Module) -> None:
    """A wider padding, taken back by the next filter."""
    block.conv1.padding = (1, 1)
    block.conv2.padding = (0, 0)


def pooled_shortcut(block: nn.Module) -> None:
    strided(block)
    block.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(12, 12, 1, bias=False), block.downsample[1]).double()
    block.downsample[1].weight.data.fill_(0.1)


Edit = Callable[[nn.Module], object]
EDITS: dict[str, tuple[Edit, bool]] = {
    "padding and dilation": (dilated, True),
    "more padding": (uneven_padding, True),
    "stride": (strided, True),
    "stride on the 1x1": (caffe, True),
    "groups": (grouped, True),
    "fewer channels": (narrower, True),
    "eps and momentum": (eps_and_momentum, True),
    "no running statistics": (untracked, True),
    "one norm frozen": (lambda b: b.bn2.eval(), True),
    "all norms frozen": (lambda b: [m.eval() for m in b.modules() if isinstance(m, nn.BatchNorm2d)], True),
    "tracking off": (lambda b: setattr(b.bn1, "track_running_stats", False), True),
    "norm without weight": (lambda b: setattr(b.bn1, "weight", None), True),
    "norm without parameters": (lambda b: [setattr(b.bn3, name, None) for name in ("weight", "bias")], True),
    "other shortcut": (pooled_shortcut, True),
    "no shortcut conv": (lambda b: setattr(b, "downsample", nn.Identity()), True),
    "absent shortcut": (lambda b: setattr(b, "downsample", None), True),
    "bias": (biased, False),
    "padding by name": (lambda b: setattr(b.conv2, "padding", "same"), False),
    "leaky activation": (lambda b: setattr(b, "relu", nn.LeakyReLU(0.1)), True),
    "capped activation": (lambda b: setattr(b, "relu", nn.ReLU6()), True),
    "instance norm": (lambda b: setattr(b, "bn2", nn.InstanceNorm2d(3, affine=True).double()), False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_after_construction_equal_the_references(edit: str) -> None:
    """After a first step, so that nothing remembered from it can answer for the second."""
    change, fused = EDITS[edit]
    ours, theirs = twins(BLOCKS["bottleneck"])
    same_as_reference(ours, theirs, fused=True)
    for block in (ours, theirs):
        block.zero_grad()
        torch.manual_seed(7)
        change(block)
        if edit == "padding by name":  # nn.Conv2d works this out in its constructor
            block.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    same_as_reference(ours, theirs, fused=fused)


def test_an_edited_stem_and_its_pooling() -> None:
    nets = [family.ResNet(family.BasicBlock, [1], width=4, num_classes=3).double() for family in (fr, reference)]
    nets[0].load_state_dict(nets[1].state_dict())
    edits: list[Edit] = [
        lambda net: setattr(net.conv1, "stride", (1, 1)),
        lambda net: setattr(net.maxpool, "stride", 1),
        lambda net: setattr(net.maxpool, "ceil_mode", True),
        lambda net: setattr(net, "relu", nn.SiLU()),
    ]
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)
    for edit in edits:
        for net in nets:
            edit(net)
        torch.testing.assert_close(*(net(x) for net in nets))


# ---------------------------------------------------------------- what takes a model apart


def test_feature_extraction_traces_the_children() -> None:
    """fx gives the features inside a block; a leaf block stays fused."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    nets = [family.ResNet(family.Bottleneck, [1, 1], width=4, num_classes=3).double() for family in (fr, reference)]
    nets[0].load_state_dict(nets[1].state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    names = ["layer1.0.conv2", "layer1.0.bn3", "layer2"]
    features = [extraction.create_feature_extractor(net, return_nodes=names).train()(x) for net in nets]
    assert list(features[0]) == names
    for name in names:
        torch.testing.assert_close(features[0][name], features[1][name])
    torch.testing.assert_close(*(dict(net.state_dict()) for net in nets))
    leaves = {"leaf_modules": [fr.Bottleneck, reference.Bottleneck]}
    extracted = [extraction.create_feature_extractor(net, ["layer1", "layer2"], tracer_kwargs=leaves) for net in nets]
    with fr.record_launches() as launches:
        mine = extracted[0].train()(x)
    torch.testing.assert_close(mine, extracted[1].train()(x))
    assert launches


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: fr.Bottleneck(8, 2),
        lambda: fr.BasicBlock(4, 4),
        lambda: fr.ConvBNReLU(3, 4, 3),
        lambda: fr.BNAddReLU(3),
        lambda: fr.Stem(),
        lambda: fr.resnet18(width=4),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(fr.BasicBlock(3, 3))),
    ],
    ids=["Bottleneck", "BasicBlock", "ConvBNReLU", "BNAddReLU", "Stem", "ResNet", "inside"],
)
def test_torchscript_is_refused_in_clear(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"TorchScript cannot hold: take torch\.compile or torch\.export"):
        torch.jit.script(make())


def test_what_torchscript_is_told_to_take_instead_works() -> None:
    ours = fr.BasicBlock(6, 6).double()
    plain = reference.BasicBlock(6, 6).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    exported = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_trained_networks_go_on_alike(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = fr.ResNet(fr.Bottleneck, [1, 1], width=4, num_classes=3).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    net(x).sum().backward()
    twin = copied(net)
    for each in (net, twin):
        each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
    mine, theirs = results(net, x), results(twin, x)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)  # type: ignore[arg-type]


def test_synchronised_norms_keep_a_layers_relu_and_a_bare_norm_that_adds_refuses() -> None:
    """PyTorch's conversion makes a new norm of every norm's attributes: ours keep their ReLU one level above.

    Of a bare BNAddReLU nothing is left that could know of it; called with a residual, the new norm says so.
    """
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(fr.ConvBNReLU(3, 4, 3)).eval()
    assert layer(torch.randn(2, 3, 4, 4)).min() == 0
    bare = nn.SyncBatchNorm.convert_sync_batchnorm(fr.BNAddReLU(3)).eval()
    assert type(bare) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(TypeError, match="positional argument"):
        bare(x, x)
