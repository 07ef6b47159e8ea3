"""timm's ResNets: its blocks with everything that may stand between their layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import fused_resnet as fr
from tests.convert.beside import converted, drawn, image, in_interpreter, reasons, same

timm = pytest.importorskip("timm")
from timm.layers import BatchNormAct2d, BlurPool2d, DropBlock2d, DropPath, convert_sync_batchnorm  # noqa: E402
from timm.models import resnet  # noqa: E402

pytestmark = in_interpreter
quick = pytest.mark.quick
SMALL = {"channels": (4, 4, 8, 8), "stem_width": 4, "num_classes": 3}


def bottleneck(stride: int = 1, **options: object) -> nn.Module:
    down = resnet.downsample_conv(8, 16, 1, stride) if stride > 1 else None
    return resnet.Bottleneck(8, 4 if stride > 1 else 2, stride, down, **options)


def activated(block: nn.Module) -> nn.Module:
    block.bn1 = BatchNormAct2d(2, act_layer=nn.SiLU)
    return block


BLOCKS = {
    "basic": (lambda: resnet.BasicBlock(8, 8), "one operation"),
    "bottleneck": (bottleneck, "one operation"),
    "stride": (lambda: bottleneck(2), "one operation"),
    "cardinality": (lambda: bottleneck(cardinality=2, base_width=64), "one operation"),
    "first dilation": (lambda: bottleneck(dilation=2, first_dilation=1), "one operation"),
    "average pool before the projection": (
        lambda: resnet.BasicBlock(8, 6, 2, resnet.downsample_avg(8, 6, 1, 2)),
        "one operation",
    ),
    "squeeze and excitation": (lambda: bottleneck(attn_layer="se"), "fused around SEModule, ReLU"),
    "efficient channel attention": (lambda: bottleneck(attn_layer="eca"), "fused around EcaModule, ReLU"),
    "blur": (lambda: bottleneck(2, aa_layer=BlurPool2d), "fused around BlurPool2d"),
    "random depth": (lambda: bottleneck(drop_path=DropPath(0.5)), "fused around DropPath, ReLU"),
    "drop block": (lambda: bottleneck(drop_block=partial(DropBlock2d, 0.3, 3)), "fused around DropBlock2d, ReLU"),
    "attention, then random depth": (
        lambda: bottleneck(attn_layer="se", drop_path=DropPath(0.5)),
        "fused around SEModule, DropPath, ReLU",
    ),
    "drop block and blur in a basic block": (
        lambda: resnet.BasicBlock(
            8, 6, 2, resnet.downsample_conv(8, 6, 1, 2), drop_block=partial(DropBlock2d, 0.3, 3), aa_layer=BlurPool2d
        ),
        "fused around DropBlock2d, ReLU, BlurPool2d",
    ),
    "norm that goes on to an activation": (
        lambda: activated(bottleneck()),
        "fused around SiLU, ReLU",
    ),
    "norm that goes on to an activation, synchronised": (
        lambda: convert_sync_batchnorm(activated(bottleneck())),
        "fused around SiLU, ReLU",
    ),
    "norm with an activation of its own": (
        lambda: bottleneck(norm_layer=partial(BatchNormAct2d, apply_act=False)),
        "one operation",
    ),
    "another activation": (lambda: bottleneck(act_layer=nn.SiLU), "fused around SiLU, SiLU, SiLU"),
}


@quick
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    make, part = BLOCKS[name]
    _, report = converted(drawn(make()), image(8, 7))
    assert report.fused_now == [("", part)]


STEMS = {
    "resnet": ({}, "one operation"),
    "c, deep": ({"stem_type": "deep"}, "fused around MaxPool2d"),
    "t, tiered and blurred": (
        {"stem_type": "deep_tiered", "aa_layer": BlurPool2d},
        "fused around MaxPool2d, BlurPool2d",
    ),
    "replaced pool": ({"replace_stem_pool": True}, "one operation"),
}


@pytest.mark.parametrize("name", STEMS)
def test_networks_and_their_stems(name: str) -> None:
    options, stem = STEMS[name]
    model = drawn(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], **SMALL, **options))
    model, report = converted(model, image(size=24), evaluation=False)
    assert dict(report.fused_now)[""] == stem and len(report.fused_now) == 5
    assert isinstance(model, resnet.ResNet)


@quick
def test_norms_that_are_kept() -> None:
    report = fr.convert(timm.create_model("resnet50_gn", device="meta"))
    assert len(report.kept) == 17 and not report.converted
    assert set(reasons(report).values()) == {"GroupNorm is no normalisation that is fused"}


def test_gradient_checkpointing_gives_the_same() -> None:
    ours = drawn(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], **SMALL))
    theirs = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], **SMALL).double()
    theirs.load_state_dict(ours.state_dict())
    fr.convert(ours)
    for model in (ours, theirs):
        model.set_grad_checkpointing()
    same(ours, theirs, image(size=16))


def test_features_only() -> None:
    """timm takes the network apart: its blocks are converted, the stem's layers are nobody's."""
    model = drawn(timm.create_model("test_resnet", features_only=True, out_indices=(1, 4)))
    _, report = converted(model, image(size=16), evaluation=False)
    assert len(report.fused_now) == 4


@quick
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dla34", "its forward takes more than one argument"),
        ("resnetv2_50", "does not tell what drop_path does"),
        ("regnetx_002", "its conv1 is a ConvNormAct"),
        ("gernet_s", "is a ConvNormAct and no plain convolution"),
    ],
)
def test_other_families_of_timm(name: str, reason: str) -> None:
    report = fr.convert(timm.create_model(name, device="meta"))
    assert not report.converted and {reason in why for why in reasons(report).values()} == {True}


@quick
@pytest.mark.parametrize("name", ["res2net50d", "skresnet18", "skresnet50d", "resnest14d", "resnest50d_4s2x40d"])
def test_no_residual_block_is_passed_over_in_silence(name: str) -> None:
    """Those of resnet.py's siblings, whose parts are others: the stem is fused, every block kept with a reason."""
    model = timm.create_model(name, device="meta")
    blocks = {name for name, module in model.named_modules() if hasattr(module, "downsample")}
    report = fr.convert(model)
    assert [name for name, _ in report.converted] == [""] and reasons(report).keys() == blocks
    assert all(why.endswith("no plain convolution") for why in reasons(report).values())


@quick
def test_fine_tuning_another_head() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    fr.convert(model)
    model.reset_classifier(5)
    assert model.eval()(torch.randn(1, 3, 16, 16)).shape == (1, 5)


@quick
def test_explain_counts_what_a_converted_network_launches() -> None:
    """Attention between the fused operations, a deep stem, pooled shortcuts."""
    options = {"stem_type": "deep", "avg_down": True, "block_args": {"attn_layer": "se"}, **SMALL}
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], **options).double()
    fr.convert(model)
    x = image()
    explained = fr.explain(model, example_input=x, dtype=torch.float64)
    with fr.record_launches() as launches:
        model(x).sum().backward()
    rows = [row for row in explained.rows if row.source in ("fused", "vendor")]
    assert {row.name for row in rows} == {"(model)", *(f"layer{i}.0" for i in (1, 2, 3, 4))}
    for total in ("flops", "bytes"):
        assert sum(getattr(row, total) for row in rows) == sum(getattr(launch, total) for launch in launches)
    assert sum(row.launches for row in rows) == len(launches)
