"""Blocks of other libraries and home-made ones, known by their structure and proven on numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from tests.convert.beside import converted, drawn, image, in_interpreter, reasons, same

pytestmark = [pytest.mark.quick, in_interpreter]


class FrozenBatchNorm2d(nn.Module):
    """As detectron2 writes it: four buffers and an eps."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class OwningConv(nn.Conv2d):
    """A convolution that owns its normalisation and its activation."""

    def __init__(self, *arguments: object, norm: nn.Module, activation: object = None, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class OwningBlock(nn.Module):
    """detectron2's bottleneck: ``stride_in_1x1`` is Caffe's placement."""

    def __init__(self, ci: int, width: int, co: int, stride: int, stride_in_1x1: bool, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = None if (ci, stride) == (co, 1) else OwningConv(ci, co, 1, stride, bias=False, norm=norm(co))
        self.conv1 = OwningConv(ci, width, 1, first, bias=False, norm=norm(width))
        self.conv2 = OwningConv(width, width, 3, second, 1, bias=False, norm=norm(width))
        self.conv3 = OwningConv(width, co, 1, bias=False, norm=norm(co))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class NamedNorms(nn.Module):
    """mmdetection's block: the normalisations' names are attributes, reached through properties."""

    def __init__(self, ci: int, co: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1 = nn.Conv2d(ci, co, 3, stride, 1, bias=False)
        self.add_module(self.norm1_name, nn.BatchNorm2d(co))
        self.conv2 = nn.Conv2d(co, co, 3, 1, 1, bias=False)
        self.add_module(self.norm2_name, nn.BatchNorm2d(co))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if (ci, stride) != (co, 1):
            self.downsample = nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(out)) + identity)


class Home(nn.Module):
    """The CIFAR blocks that many copied: ``F.relu``, and an empty Sequential for no projection."""

    def __init__(self, ci: int = 6, co: int = 6, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ci, co, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(co)
        self.conv2 = nn.Conv2d(co, co, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(co)
        self.shortcut = nn.Sequential()
        if (ci, stride) != (co, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))

    def inner(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


BLOCKS = {
    "detectron2": lambda: OwningBlock(6, 3, 6, 1, False),
    "detectron2, stride": lambda: OwningBlock(6, 3, 8, 2, False),
    "detectron2, Caffe's stride": lambda: OwningBlock(6, 3, 8, 2, True),
    "detectron2, frozen": lambda: OwningBlock(6, 3, 8, 2, True, FrozenBatchNorm2d),
    "mmdetection": lambda: NamedNorms(6, 6),
    "mmdetection, stride": lambda: NamedNorms(6, 8, 2),
    "home-made": Home,
    "home-made, stride": lambda: Home(6, 8, 2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_known_by_structure(name: str) -> None:
    model, report = converted(drawn(BLOCKS[name]()), image(6, 9))
    assert report.fused_now == [("", "one operation")]
    assert fr.revert(model).converted and type(model).__module__ == __name__


class Dropping(Home):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dropout(self.inner(x)) + self.shortcut(x))


class DroppingSilently(Home):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.dropout(self.inner(x), 0.1, self.training) + self.shortcut(x))


class PreActivated(Home):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class Scaled(Home):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(0.2 * self.inner(x) + self.shortcut(x))


class LearnedScale(Home):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.scale * self.inner(x) + self.shortcut(x))


class Detached(Home):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x).detach())


class Squeezed(Home):
    def __init__(self) -> None:
        super().__init__()
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return F.relu(out * self.se(out) + self.shortcut(x))


class NoLastActivation(Home):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shortcut(x)


class OnlyInTraining(Home):
    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return F.relu(out + self.shortcut(x)) if self.training else F.relu(out)


class TwoInputs(Home):
    """DLA's blocks: a shortcut may be given."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return F.relu(self.inner(x) + (self.shortcut(x) if shortcut is None else shortcut))


class TwoOutputs(Home):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.inner(x)
        return F.relu(out + self.shortcut(x)), out


class Biased(Home):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class OtherConvolutions(Home):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (Standardised(6, 6, 3, 1, 1, bias=False) for _ in range(2))


KEPT = {
    Dropping: "does not tell what dropout does",
    DroppingSilently: "not that of a residual block",
    PreActivated: "not that of a residual block",
    Scaled: "not that of a residual block",
    LearnedScale: "not that of a residual block",
    Detached: "not that of a residual block",
    Squeezed: "does not tell what se does",
    NoLastActivation: "not that of a residual block",
    OnlyInTraining: "not that of a residual block",
    TwoInputs: "takes more than one argument",
    TwoOutputs: "returns no tensor",
    Biased: "a convolution has a bias",
    OtherConvolutions: "not that of a residual block",
}


@pytest.mark.parametrize("block", KEPT, ids=lambda block: block.__name__)
def test_kept(block: type[nn.Module]) -> None:
    model = block()
    report = fr.convert(model)
    assert not report.converted and KEPT[block] in reasons(report)[""]
    assert type(model) is block


def test_what_could_not_be_tried_is_kept() -> None:
    model = nn.Sequential(Home(), Home().to("meta"))
    report = fr.convert(model)
    assert [name for name, _ in report.converted] == ["0"] and "meta device" in reasons(report)["1"]


def test_the_trial_changes_nothing() -> None:
    model = nn.Sequential(Dropping(), Home()).eval()
    model[1].conv1.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    fr.convert(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training and not model[1].conv1.weight.requires_grad and model[1].bn1.weight.grad is None
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_argument_keeps_its_name() -> None:
    class Named(Home):
        def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(features)

    block, x = Named().double().eval(), image(6, 5)
    expected = block(features=x)
    assert fr.convert(block).fused_now
    torch.testing.assert_close(block(features=x), expected)


def test_edits_after_conversion() -> None:
    """Geometry, eps and activations are read at call time; a child that was added makes the block step aside."""
    ours, theirs = drawn(OwningBlock(6, 3, 8, 2, False)), drawn(OwningBlock(6, 3, 8, 2, False))
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    for block in (ours, theirs):
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (2, 2), (2, 2)
        block.shortcut.stride = (1, 1)
        block.conv1.norm.eps = 0.5
    same(ours, theirs, image(6, 8))
    ours.add_module("another", nn.Identity())
    theirs.add_module("another", nn.Identity())
    same(ours, theirs, image(6, 8), fused=False)


@pytest.mark.parametrize("name", ["conv1", "conv3", "shortcut"])
@pytest.mark.parametrize("activation", [F.silu, nn.SiLU()], ids=["function", "module"])
def test_an_activation_given_later_to_a_convolution_that_owns_its_norm(name: str, activation: object) -> None:
    ours, theirs = drawn(OwningBlock(6, 3, 8, 2, False)), drawn(OwningBlock(6, 3, 8, 2, False))
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    for value, fused in ((activation, False), (None, True)):
        for block in (ours, theirs):
            getattr(block, name).activation = value
        same(ours, theirs, image(6, 8), fused)


class Scaling(OwningConv):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


def test_a_setting_of_a_convolution_that_changes_later() -> None:
    def block() -> nn.Module:
        made = OwningBlock(6, 3, 6, 1, False)
        made.conv1, made.conv2, made.conv3 = (
            Scaling(ci, co, 1, bias=False, norm=nn.BatchNorm2d(co)) for ci, co in ((6, 3), (3, 3), (3, 6))
        )
        return drawn(made)

    ours, theirs = block(), block()
    ours.load_state_dict(theirs.state_dict())
    assert fr.convert(ours).fused_now == [("", "one operation")]
    for made in (ours, theirs):
        made.conv2.factor = 0.5
    same(ours, theirs, image(6, 8), fused=False)
    assert "conv2.factor is another" in dict(fr.convert(ours).converted)[""]


class Split(nn.Module):
    """A residual block none of whose parts is a convolution named as a ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.second = nn.Conv2d(6, 6, 1)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


class Unnamed(Split):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 1)


class Stage(nn.Module):
    """What ConvNeXt calls a stage: the place for a shortcut is none."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(6, 6, 1)
        self.blocks = nn.Sequential(Home(), Home())


def test_blocks_of_other_parts_are_named_with_a_reason() -> None:
    said = reasons(fr.convert(nn.Sequential(Split(), Unnamed(), Stage())))
    assert said == {
        "0": "its first is a Sequential and no plain convolution",
        "1": "its convolutions are not named conv1, conv2",
    }
