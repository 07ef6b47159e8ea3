"""``fold``: plain copies that compute what the model computes in evaluation, of aten operations alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_resnet as fr
from fused_resnet import reference
from tests import numerics

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
quick = pytest.mark.quick
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)


def drawn(model: nn.Module) -> nn.Module:
    """Every number of the norms drawn, so that none is the identity; outputs stay of the size of the inputs."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            for t, low, width in (
                (module.weight, 0.6, 0.4),
                (module.bias, -0.2, 0.4),
                (module.running_mean, -0.2, 0.4),
                (module.running_var, 0.7, 0.6),
            ):
                if t is not None:
                    t.data.uniform_(low, low + width)
    return model


def remaining(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def ours(model: nn.Module) -> list[str]:
    """Modules of classes that hold kernels."""
    kernels = ("fused_resnet.modules", "fused_resnet.families")
    return [
        name
        for name, module in model.named_modules()
        if any(kind.__module__.startswith(kernels) for kind in type(module).__mro__)
    ]


def state(model: nn.Module) -> dict[str, Any]:
    """All that folding must leave alone, bit for bit."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {name: (id(t), t._version, t.requires_grad, t.clone()) for name, t in tensors.items()}
    found |= {f"{name} is": (type(m), m.training, id(m), set(vars(m))) for name, m in model.named_modules()}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def evaluated(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What plain PyTorch gives in eval mode."""
    with torch.no_grad(), fr.use_route("reference"):
        out = copy.deepcopy(model).eval()(*inputs)
    return out if isinstance(out, Tensor) else out.last_hidden_state  # type: ignore[no-any-return]


def check(model: nn.Module, *inputs: Tensor, left: int = 0) -> nn.Module:
    """Folds ``model`` and checks all that a folded copy promises; ``left``: norms that stay."""
    model = drawn(model).double().train()
    inputs = tuple(t.double() for t in inputs)
    before = state(model)
    folded = fr.fold(model)
    assert same(before, state(model)), "the given model was touched"
    storages = [
        {t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()} for m in (model, folded)
    ]
    assert not storages[0] & storages[1]
    assert not any(module.training for module in folded.modules())
    assert not any(t.requires_grad for t in folded.parameters())
    assert len(remaining(folded)) == left, remaining(folded)
    assert not ours(folded)
    expected = evaluated(model, *inputs)
    out = evaluated(folded, *inputs)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    return folded


def exported(folded: nn.Module, *inputs: Tensor) -> None:
    """torch.export and torch.jit.trace see aten operations alone, and compute the same."""
    inputs = tuple(t.double() for t in inputs)
    expected = evaluated(folded, *inputs)
    program = torch.export.export(folded, inputs)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith("aten.") for name in called), called
    assert not any("batch_norm" in name for name in called), called
    for runnable in (program.module(), torch.jit.trace(folded, inputs)):
        torch.testing.assert_close(evaluated_as_is(runnable, *inputs), expected)


def evaluated_as_is(model: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 33, 33), dtype=torch.float64)


# ---------------------------------------------------------------- other families' models


@quick
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_torchvision(name: str, converted: bool) -> None:
    model = getattr(torchvision.models, name)(num_classes=7)
    if converted:
        assert fr.convert(model, recompute=("y1",)).converted
    folded = check(model, image())
    assert {type(m) for m in folded.modules()} == {
        type(m) for m in getattr(torchvision.models, name)().modules() if not isinstance(m, nn.BatchNorm2d)
    } | {nn.Identity}
    if not converted and name == "resnet18":
        exported(folded, image())


@pytest.mark.parametrize("name", ["resnet50d", "seresnet50", "resnetblur50", "resnet26t"])
def test_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    assert fr.convert(model).converted
    folded = check(model, image())
    if name == "resnet50d":
        exported(folded, image())


def test_timm_with_our_blocks() -> None:
    folded = check(timm.create_model("resnet26d", block=fr.Bottleneck, num_classes=7), image())
    assert isinstance(folded.layer1[0], timm.models.resnet.Bottleneck)


@quick
def test_a_norm_that_goes_on_to_an_activation_keeps_it() -> None:
    from timm.layers import BatchNormAct2d

    block = timm.models.resnet.BasicBlock(8, 8)
    block.bn1, block.act1 = BatchNormAct2d(8, act_layer=nn.SiLU), nn.Identity()
    folded = check(block, image(2, 8, 7, 7))
    assert [type(m) for m in folded.bn1] == [nn.SiLU]
    with_relu = timm.models.resnet.BasicBlock(8, 8)
    with_relu.bn1, with_relu.act1 = BatchNormAct2d(8), nn.Identity()
    exported(check(with_relu, image(2, 8, 7, 7)), image(2, 8, 7, 7))


def test_frozen_norms() -> None:
    check(torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=7), image())


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=3
    )
    model = transformers.ResNetModel(config)
    fr.convert(model)
    check(model, image())


# ---------------------------------------------------------------- blocks known by their structure


class NormedConv(nn.Conv2d):
    """detectron2's Conv2d: the normalisation and the activation are the convolution's own."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, bias=False, **keywords)
        self.norm = torchvision.ops.FrozenBatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class OwningBlock(nn.Module):
    """detectron2's BottleneckBlock, its stride where the caffe models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = NormedConv(8, 4, 1, stride=2)
        self.conv2 = NormedConv(4, 4, 3, padding=1)
        self.conv3 = NormedConv(4, 12, 1)
        self.shortcut = NormedConv(8, 12, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu_(self.conv1(x))
        out = self.conv3(torch.relu_(self.conv2(out)))
        return torch.relu_(out + self.shortcut(x))


class Liar(torchvision.models.resnet.BasicBlock):
    """The children of a block of torchvision's, and another forward: nothing of it is known."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv1(x)) + self.bn1(self.conv2(x)))


@quick
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_a_norm_that_belongs_to_its_convolution(converted: bool) -> None:
    model = nn.Sequential(OwningBlock())
    if converted:
        assert fr.convert(model).converted
    folded = check(model, image(2, 8, 9, 9))
    assert type(folded[0]) is OwningBlock
    exported(folded, image(2, 8, 9, 9))


# ---------------------------------------------------------------- our own


class Tail(nn.Module):
    """A convolution outside, and the norm that takes it and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(8, 8, 1), fr.BNAddReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv(x), x)


@pytest.mark.parametrize(
    "build",
    [
        lambda: fr.resnet18(num_classes=7),
        lambda: fr.resnet50(num_classes=7, stochastic_depth_prob=0.5, width_per_group=32),
        lambda: fr.plain(18, num_classes=7),
        lambda: fr.plain(50, num_classes=7, width=16),
        lambda: fr.cifar_resnet(8),
        lambda: fr.cifar_resnet(8, shortcut="C"),
        lambda: fr.cifar_plain(8),
    ],
    ids=["resnet18", "resnet50", "plain18", "plain50", "cifar A", "cifar C", "cifar plain"],
)
def test_our_networks(build: Callable[[], nn.Module]) -> None:
    model = build()
    folded = check(model, image())
    assert type(folded) is reference.ResNet
    if len(list(folded.modules())) < 100:
        exported(folded, image())


@quick
def test_our_layers() -> None:
    check(nn.Sequential(fr.Stem(3, 8), fr.ConvBNReLU(8, 6, 3, relu=False), fr.ConvBNReLU(6, 4, 1)), image())
    tail = check(Tail(), image(2, 8, 5, 5), left=1)  # whose input a norm of ours takes is not known
    assert type(tail.add) is reference.BNAddReLU
    assert type(check(fr.SEBasicBlock(8, 8), image(2, 8, 7, 7))) is reference.SEBasicBlock
    exported(check(fr.SEBottleneck(16, 4), image(2, 16, 7, 7)), image(2, 16, 7, 7))
    block = check(fr.Bottleneck(16, 4, recompute=("y1",)), image(2, 16, 7, 7))
    assert type(block) is reference.Bottleneck and not {"recompute", "keep"} & set(vars(block))


# ---------------------------------------------------------------- what stays as it is


@quick
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_what_is_not_known_stays_as_it_is(converted: bool) -> None:
    edits: dict[str, Callable[[Any], object]] = {
        "hook on the convolution": lambda b: b.conv1.register_forward_hook(lambda *_: None),
        "hook on the norm": lambda b: b.bn1.register_forward_hook(lambda *_: None),
        "parametrised": lambda b: parametrizations.weight_norm(b.conv1),
        "another norm": lambda b: setattr(b, "bn1", nn.GroupNorm(2, 8)),
        "no running statistics": lambda b: setattr(b, "bn1", nn.BatchNorm2d(8, track_running_stats=False)),
        "one norm for two": lambda b: setattr(b, "bn2", b.bn1),
        "one convolution for two": lambda b: setattr(b, "conv2", b.conv1),
        "replaced forward": lambda b: setattr(b, "forward", type(b).forward.__get__(b)),
        "a bias": lambda b: setattr(b, "conv1", nn.Conv2d(8, 8, 3, padding=1)),
    }
    left = dict.fromkeys(edits, 1) | {"another norm": 0, "one norm for two": 1, "one convolution for two": 2}
    left |= {"replaced forward": 2, "a bias": 0}
    for name, edit in edits.items():
        model = nn.Sequential(torchvision.models.resnet.BasicBlock(8, 8))
        if converted and name != "replaced forward":
            fr.convert(model)
        edit(model[0])
        check(model, image(2, 8, 7, 7), left=left[name])


@quick
def test_a_subclass_is_not_trusted() -> None:
    check(nn.Sequential(Liar(8, 8)), image(2, 8, 7, 7), left=2)


def test_layers_outside_of_blocks_stay() -> None:
    folded = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), left=1)
    assert [type(module) for module in folded] == [nn.Conv2d, nn.BatchNorm2d]


# ---------------------------------------------------------------- dtypes, layouts, devices, errors


@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_rule(dtype: torch.dtype) -> None:
    """A folded block is no further from float64 than the block; in bfloat16 its weights round once more."""
    model = drawn(fr.Bottleneck(32, 16, 1, reference.blocks.projection(32, 64, 1, nn.BatchNorm2d))).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    x = torch.randn(4, 32, 13, 13).to(dtype)
    oracle = evaluated(copy.deepcopy(model).double(), x.double())
    out, eager = evaluated(fr.fold(model), x), evaluated(model, x)
    assert out.dtype == eager.dtype == dtype
    if dtype == torch.float32:
        numerics.check(out, eager, oracle, "z")
    else:
        assert (out - oracle).square().mean().sqrt() < 2**-7.5 * oracle.square().mean().sqrt()


@quick
def test_channels_last_and_meta() -> None:
    folded = fr.fold(fr.resnet18(num_classes=3).to(memory_format=torch.channels_last))
    assert folded.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        assert not remaining(fr.fold(fr.resnet18()))


@quick
def test_a_folded_model_is_like_any_other() -> None:
    """It folds again to itself, converts without effect, loads its own state dict and has only what it needs."""
    folded = fr.fold(fr.cifar_resnet(8).eval())
    again = fr.fold(folded)
    again.load_state_dict(folded.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), again.parameters(), strict=True))
    assert not list(folded.buffers())
    convs = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)
    assert len({id(t) for t in folded.parameters()}) == 2 * len(convs) + 2


@quick
def test_a_scripted_model_is_refused() -> None:
    scripted = torch.jit.script(torchvision.models.resnet.BasicBlock(4, 4))
    with pytest.raises(TypeError, match="a scripted model cannot be folded; fold the model that it was made from"):
        fr.fold(nn.Sequential(scripted))
