"""The blocks' two constructors: torchvision's and timm's, in those libraries' own networks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests.convert.beside import drawn, image, in_interpreter, same

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
from timm.layers import BlurPool2d, DropPath  # noqa: E402
from timm.models import resnet as timm_resnet  # noqa: E402
from torchvision.models import resnet  # noqa: E402

pytestmark = [pytest.mark.quick, in_interpreter]
Make = Any


def projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))


TORCHVISION: dict[str, Make] = {
    "basic": lambda f: f.BasicBlock(8, 8),
    "basic, by keyword": lambda f: f.BasicBlock(inplanes=8, planes=12, stride=2, downsample=projection()),
    "bottleneck": lambda f: f.Bottleneck(8, 2),
    "all positions": lambda f: f.Bottleneck(8, 3, 2, projection(), 2, 64, 1, nn.BatchNorm2d),
    "groups": lambda f: f.Bottleneck(8, 2, groups=2, base_width=96),
    "dilation": lambda f: f.Bottleneck(8, 2, dilation=2, norm_layer=lambda c: nn.BatchNorm2d(c, eps=0.1)),
}
TIMM: dict[str, Make] = {
    "basic": lambda f: f.BasicBlock(8, 8, act_layer=nn.ReLU),
    "bottleneck, their resnet's call": lambda f: f.Bottleneck(
        8, 3, 2, projection(), first_dilation=1, cardinality=1, base_width=64, reduce_first=1, dilation=1
    ),
    "cardinality": lambda f: f.Bottleneck(8, 2, cardinality=2, base_width=64),
    "reduced first": lambda f: f.Bottleneck(8, 2, reduce_first=2),
    "squeeze and excitation": lambda f: f.Bottleneck(8, 2, attn_layer="se"),
    "random depth": lambda f: f.BasicBlock(8, 8, drop_path=DropPath(0.5)),
    "blur": lambda f: f.Bottleneck(8, 3, 2, projection(), aa_layer=BlurPool2d),
    "dilation": lambda f: f.Bottleneck(8, 2, dilation=2, first_dilation=1),
    "average pool": lambda f: f.BasicBlock(8, 12, 2, timm_resnet.downsample_avg(8, 12, 1, 2), act_layer=nn.ReLU),
}
CASES = [(resnet, TORCHVISION, name) for name in TORCHVISION] + [(timm_resnet, TIMM, name) for name in TIMM]


@pytest.mark.parametrize(("family", "cases", "name"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_familys_block(family: Any, cases: dict[str, Make], name: str) -> None:
    """The same seed gives the same weights under the same keys, checkpoints load both ways, results are eager's."""
    blocks = []
    for source in (fr, family):
        torch.manual_seed(2)
        blocks.append(cases[name](source))
    ours, theirs = blocks
    assert type(theirs) in (family.BasicBlock, family.Bottleneck) and isinstance(ours, type(theirs))
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[key], other[key]) for key in other)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    theirs.load_state_dict(drawn(ours).state_dict())
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs.double(), image(8, 7))


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_an_instance_of_both_families(name: str) -> None:
    for block in (getattr(fr, name)(8, 8), getattr(fr, name)(8, 8, act_layer=nn.ReLU)):
        assert isinstance(block, getattr(resnet, name)) and isinstance(block, getattr(timm_resnet, name))
    assert getattr(fr, name).expansion == getattr(resnet, name).expansion


WRONG: dict[str, tuple[Make, str]] = {
    "both families": (lambda f: f(8, 8, groups=1, cardinality=1), "cardinality is timm's and groups torchvision's"),
    "both, by position": (lambda f: f(8, 8, 1, None, 1, act_layer=nn.ReLU), "act_layer is timm's and .* groups"),
    "a stride of a module": (lambda f: f(8, 8, nn.ReLU()), "stride got ReLU"),
    "a downsample of a number": (lambda f: f(8, 8, 1, 1), "downsample got 1, a int"),
    "planes of a float": (lambda f: f(8, 8.0), "planes got 8.0, a float"),
    "groups of a norm": (lambda f: f(8, 8, 1, None, nn.BatchNorm2d), "groups got"),
    "a norm of a number": (lambda f: f(8, 8, norm_layer=3), "norm_layer got 3, a int"),
    "a flag": (lambda f: f(8, 8, True), "stride got True, a bool"),
    "too many": (lambda f: f(8, 8, 1, None, 1, 64, 1, None, None), "at most 8 positional arguments, got 9"),
    "timm's, wrong type": (lambda f: f(8, 8, "2", act_layer=nn.ReLU), "stride got '2', a str"),
    "an unknown keyword": (lambda f: f(8, 8, colour=3), "colour"),
}


@pytest.mark.parametrize("block", [fr.BasicBlock, fr.Bottleneck], ids=lambda block: block.__name__)
@pytest.mark.parametrize("name", WRONG)
def test_mistakes_name_the_argument(name: str, block: type[nn.Module]) -> None:
    make, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        make(block)


def test_memory_options_of_both_constructors() -> None:
    for options in ({}, {"act_layer": nn.ReLU}):
        block = fr.Bottleneck(8, 2, recompute=("y1",), **options)
        assert block.recompute == ("y1",)
        with pytest.raises(ValueError, match="y9"):
            fr.Bottleneck(8, 2, recompute=("y9",), **options)


def weights_of_the_last_norms(model: nn.Module) -> list[Tensor]:
    blocks = [m for m in model.modules() if isinstance(m, resnet.Bottleneck | timm_resnet.Bottleneck)]
    return [block.bn3.weight for block in blocks]


@pytest.mark.parametrize("zero_init", [True, False])
def test_zero_init_residual(zero_init: bool) -> None:
    models = [
        resnet.ResNet(fr.Bottleneck, [1, 1, 1, 1], zero_init_residual=zero_init, width_per_group=8),
        timm.create_model("test_resnet", block=fr.Bottleneck, zero_init_last=zero_init),
    ]
    for model in models:
        last = weights_of_the_last_norms(model)
        assert len(last) >= 4 and all(bool((w == 0).all()) == zero_init for w in last)


NETWORKS: dict[str, Make] = {
    "torchvision": lambda f: resnet.ResNet(f(resnet).Bottleneck, [1, 2, 1, 1], groups=2, width_per_group=4),
    "torchvision, dilated": lambda f: resnet.ResNet(
        f(resnet).Bottleneck, [1, 1, 1, 2], replace_stride_with_dilation=[False, True, True]
    ),
    "timm, deep stem, averaged shortcuts, random depth": lambda f: timm.create_model(
        "resnet26d", block=f(timm_resnet).Bottleneck, drop_path_rate=0.1
    ),
    "timm, attention and blur": lambda f: timm.create_model("seresnetaa50d", block=f(timm_resnet).Bottleneck),
    "timm, groups": lambda f: timm.create_model("resnext50_32x4d", block=f(timm_resnet).Bottleneck),
    "timm, dilated": lambda f: timm.create_model("resnet18", block=f(timm_resnet).BasicBlock, output_stride=8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_in_the_libraries_networks(name: str) -> None:
    """Keys, shapes and geometry of the family's own network; every block fused."""
    with torch.device("meta"):
        ours, theirs = NETWORKS[name](lambda family: fr), NETWORKS[name](lambda family: family)

    def anatomy(model: nn.Module) -> dict[str, str]:
        return {n: m.extra_repr() for n, m in model.named_modules()}

    assert anatomy(ours) == anatomy(theirs)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    blocks = [m for m in ours.modules() if isinstance(m, fr.BasicBlock | fr.Bottleneck)]
    assert len(blocks) >= 4 and all(isinstance(block.fused_part(), str) for block in blocks)


def test_a_network_of_them_gives_the_librarys_results_with_its_checkpoint() -> None:
    options = {"channels": (4, 4, 8, 8), "stem_width": 4, "num_classes": 3}
    ours = drawn(timm_resnet.ResNet(fr.BasicBlock, [1, 1, 1, 1], **options))
    theirs = timm_resnet.ResNet(timm_resnet.BasicBlock, [1, 1, 1, 1], **options).double()
    theirs.load_state_dict(ours.state_dict())
    same(ours, theirs, image(size=16))
