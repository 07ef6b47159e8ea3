"""torchvision's ResNets, and the backbones that its detection and segmentation models make of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests.convert.beside import converted, drawn, image, in_interpreter, reasons, results, same
from tests.eager import agree
from tests.features.test_step_aside import EDITS as MORE_EDITS
from tests.modules.test_blocks import EDITS as CHILD_EDITS

detection = pytest.importorskip("torchvision.models.detection.backbone_utils")
from torchvision.models import resnet  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.quantization.resnet import QuantizableBasicBlock  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

pytestmark = in_interpreter
quick = pytest.mark.quick
ONE = [1, 1, 1, 1]


def projection(ci: int, co: int, stride: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), norm(co))


BLOCKS = {
    "basic": lambda: resnet.BasicBlock(8, 8),
    "basic, stride": lambda: resnet.BasicBlock(8, 6, 2, projection(8, 6, 2)),
    "bottleneck": lambda: resnet.Bottleneck(8, 2),
    "bottleneck, stride": lambda: resnet.Bottleneck(8, 3, 2, projection(8, 12, 2)),
    "groups": lambda: resnet.Bottleneck(8, 2, groups=2, base_width=64),
    "dilation": lambda: resnet.Bottleneck(8, 2, dilation=2),
    "frozen": lambda: resnet.Bottleneck(8, 3, 2, projection(8, 12, 2, FrozenBatchNorm2d), norm_layer=FrozenBatchNorm2d),
    "another eps": lambda: resnet.BasicBlock(8, 8, norm_layer=partial(nn.BatchNorm2d, eps=0.1, momentum=0.3)),
}


@quick
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    _, report = converted(drawn(BLOCKS[name]()), image(8, 7))
    assert report.fused_now == [("", "one operation")]


@quick
def test_a_whole_network() -> None:
    model = drawn(resnet.ResNet(resnet.Bottleneck, ONE, num_classes=4, width_per_group=8))
    model, report = converted(model, image(), evaluation=False)
    assert [name for name, _ in report.fused_now] == ["", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert isinstance(model, resnet.ResNet) and isinstance(model.layer1[0], resnet.Bottleneck)
    assert reasons(report) == {}


@quick
def test_norms_frozen_in_a_model_that_trains() -> None:
    """Fine-tuning: eval mode and requires_grad, set after the conversion, are read at call time."""
    ours, theirs = (drawn(resnet.Bottleneck(8, 3, 2, projection(8, 12, 2))) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    for block in (ours, theirs):
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.weight.requires_grad_(False)
        block.conv1.weight.requires_grad_(False)
    same(ours, theirs, image(8, 7))


@quick
def test_deeplabs_edits_after_conversion() -> None:
    ours, theirs = (drawn(resnet.Bottleneck(8, 3, 2, projection(8, 12, 2))) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    for block in (ours, theirs):
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (4, 4), (4, 4)
        block.downsample[0].stride = (1, 1)
        block.bn2.eps, block.bn2.momentum = 1e-2, 0.5
    same(ours, theirs, image(8, 7))


EDITS: dict[str, Callable[[nn.Module], object]] = {
    **{name: edit for name, (edit, _) in MORE_EDITS.items() if name != "padding by name"},
    **{f"{name} of a child": edit for name, edit in CHILD_EDITS.items() if name != "circular padding"},
}


@quick
@pytest.mark.parametrize("name", EDITS)
def test_every_edit_after_the_conversion_equals_eager(name: str) -> None:
    """And both ways: what the block is given back after ``revert`` has the edit, too."""
    ours, theirs = (drawn(resnet.Bottleneck(12, 3, 1, projection(12, 12, 1))) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    for block in (ours, theirs):
        torch.manual_seed(5)
        EDITS[name](block)
    x = image(12, 6)
    agree(results(ours, x), results(theirs, x))
    assert fr.revert(ours).converted and type(ours) is resnet.Bottleneck
    same(ours, theirs, x, fused=False)


@quick
@pytest.mark.parametrize("norm", [partial(nn.GroupNorm, 2), nn.InstanceNorm2d])
def test_other_norms_are_kept_with_the_reason(norm) -> None:
    block = resnet.Bottleneck(8, 2, norm_layer=norm)
    report = fr.convert(block)
    name = type(block.bn1).__name__
    assert report.converted == [] and reasons(report) == {"": f"{name} is no normalisation that is fused"}
    assert type(block) is resnet.Bottleneck


def test_a_segmentation_backbone() -> None:
    """What torchvision's segmentation builds: dilated stages, and the network's children without its forward."""
    strides = [False, True, True]
    network = resnet.ResNet(resnet.Bottleneck, ONE, width_per_group=8, replace_stride_with_dilation=strides)
    backbone = IntermediateLayerGetter(drawn(network), {"layer3": "aux", "layer4": "out"})
    _, report = converted(backbone, image(size=9), evaluation=False)
    assert [name for name, _ in report.fused_now] == [f"layer{i}.0" for i in (1, 2, 3, 4)]


def test_a_detection_backbone() -> None:
    """A feature pyramid over frozen norms, the first stages without gradients."""
    backbone = detection.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=1
    )
    for name, t in backbone.named_buffers():
        if name.endswith("var"):
            t.fill_(64.0)  # what the random convolutions add up to, so that eight blocks do not overflow
    _, report = converted(backbone.double(), image(size=32, batch=1), evaluation=False)
    assert len(report.fused_now) == 8 and not report.kept


@quick
def test_the_quantizable_subclass_is_kept() -> None:
    report = fr.convert(nn.Sequential(QuantizableBasicBlock(8, 8)))
    assert "is a subclass of torchvision.models.resnet.BasicBlock" in reasons(report)["0"]


@quick
def test_features_by_hook_and_by_fx() -> None:
    """A hook on a child makes its block run child by child; fx traces the family's own forward."""
    ours, theirs = (drawn(resnet.BasicBlock(8, 8)) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    seen: list[Tensor] = []
    handle = ours.bn1.register_forward_hook(lambda module, inputs, out: seen.append(out))
    same(ours, theirs, image(8, 5), fused=False)
    assert len(seen) == 1
    handle.remove()
    same(ours, theirs, image(8, 5))
    traced = torch.fx.symbolic_trace(ours)
    assert "conv2" in {str(node.target) for node in traced.graph.nodes}
    same(traced, theirs, image(8, 5), fused=False)
