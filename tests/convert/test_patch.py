"""``patch``: the libraries' own builders make fused blocks, and only while it lasts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from tests.convert.beside import drawn, image, in_interpreter, same

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
from timm.models import hrnet  # noqa: E402
from timm.models import resnet as timm_resnet  # noqa: E402
from torchvision.models import resnet  # noqa: E402

pytestmark = [pytest.mark.quick, in_interpreter]


def names() -> dict[str, Any]:
    modules = {"torchvision": resnet, "timm": timm_resnet, "timm.hrnet": hrnet}
    return {
        f"{m}.{name}": getattr(module, name) for m, module in modules.items() for name in ("BasicBlock", "Bottleneck")
    }


def kinds(model: nn.Module) -> set[type]:
    families = (resnet.BasicBlock, resnet.Bottleneck, timm_resnet.BasicBlock, timm_resnet.Bottleneck)
    return {type(module) for module in model.modules() if isinstance(module, families)}


BUILDERS = {
    "torchvision, resnet18": (lambda: resnet.resnet18(), fr.BasicBlock),
    "torchvision, resnet50": (lambda: torchvision.models.resnet50(), fr.Bottleneck),
    "torchvision, by name": (lambda: torchvision.models.get_model("resnext50_32x4d"), fr.Bottleneck),
    "torchvision, segmentation": (
        lambda: torchvision.models.segmentation.fcn_resnet50(weights_backbone=None),
        fr.Bottleneck,
    ),
    "timm, resnet50": (lambda: timm.create_model("resnet50"), fr.Bottleneck),
    "timm, seresnet18": (lambda: timm.create_model("seresnet18"), fr.BasicBlock),
    "timm, ecaresnet50t": (lambda: timm.create_model("ecaresnet50t"), fr.Bottleneck),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_make_fused_blocks(name: str) -> None:
    build, kind = BUILDERS[name]
    before = names()
    with torch.device("meta"):
        with fr.patch():
            model = build()
        outside = build()
    assert kinds(model) == {kind} and kind not in kinds(outside) and len(kinds(outside)) == 1
    assert list(model.state_dict()) == list(outside.state_dict())
    assert names() == before


def test_a_table_of_blocks_elsewhere() -> None:
    """hrnet takes them from a dictionary of its own."""
    with torch.device("meta"):
        with fr.patch():
            model = timm.create_model("hrnet_w18_small")
        assert kinds(timm.create_model("hrnet_w18_small")) == {timm_resnet.BasicBlock, timm_resnet.Bottleneck}
    assert kinds(model) == {fr.BasicBlock, fr.Bottleneck}


@pytest.mark.parametrize("build", [lambda: resnet.resnet18(num_classes=3), lambda: timm.create_model("test_resnet")])
def test_the_same_seed_gives_the_same_weights(build: Any) -> None:
    torch.manual_seed(5)
    theirs = build()
    torch.manual_seed(5)
    with fr.patch():
        ours = build()
    assert kinds(ours) & {fr.BasicBlock, fr.Bottleneck}
    for (name, mine), (other, weight) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, weight), name


def test_what_was_built_stays_fused_and_runs() -> None:
    with fr.patch():
        ours = resnet.BasicBlock(6, 6)
    assert type(ours) is fr.BasicBlock
    theirs = resnet.BasicBlock(6, 6)
    drawn(ours)
    theirs.double().load_state_dict(ours.state_dict())
    same(ours, theirs, image(6, 5))
    same(copy.deepcopy(ours), theirs, image(6, 5))


def test_names_come_back_after_an_exception_and_from_a_nested_one() -> None:
    before = names()
    with pytest.raises(RuntimeError, match="boom"), fr.patch():
        with fr.patch():
            pass
        assert resnet.Bottleneck is timm_resnet.Bottleneck is hrnet.Bottleneck is fr.Bottleneck
        raise RuntimeError("boom")
    assert names() == before


def test_instances_made_outside_are_still_instances_of_what_the_name_was() -> None:
    outside = resnet.BasicBlock(6, 6)
    original = resnet.BasicBlock
    with fr.patch():
        assert isinstance(resnet.BasicBlock(6, 6), original)
        assert isinstance(outside, original)
