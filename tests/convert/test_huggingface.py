"""Hugging Face's ResNets, models of transformers, saved and loaded as always."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.families.children import norm_reader
from tests.convert.beside import converted, drawn, image, in_interpreter, reasons, same

transformers = pytest.importorskip("transformers")
from transformers.models.detr import modeling_detr  # noqa: E402
from transformers.models.resnet import modeling_resnet  # noqa: E402

pytestmark = in_interpreter
quick = pytest.mark.quick


def config(**options: Any) -> Any:
    small = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetConfig(**small | options)


@pytest.mark.parametrize(
    "options",
    [{"layer_type": "bottleneck"}, {"layer_type": "basic"}, {"downsample_in_bottleneck": True}],
    ids=["bottleneck", "basic", "stride in the first convolution"],
)
def test_the_model(options: dict[str, Any]) -> None:
    model = drawn(transformers.ResNetModel(config(**options)))
    model, report = converted(model, image(size=16), evaluation=False)
    assert [name for name, _ in report.fused_now] == ["embedder", *(f"encoder.stages.{i}.layers.0" for i in (0, 1))]
    assert set(dict(report.fused_now).values()) == {"one operation"} and not report.kept


@quick
def test_the_classifier_saved_and_loaded(tmp_path: Path) -> None:
    model = transformers.ResNetForImageClassification(config(num_labels=3)).eval()
    fr.convert(model)
    model.save_pretrained(tmp_path)
    x = image(batch=1)
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path).eval().double()
    out, again = model.double()(x, labels=torch.tensor([1])), loaded(x, labels=torch.tensor([1]))
    torch.testing.assert_close(out.logits, again.logits)
    out.loss.backward()


@quick
def test_the_backbone() -> None:
    model = drawn(transformers.ResNetBackbone(config(out_features=["stage1", "stage2"])))
    ours = copy.deepcopy(model)
    assert len(fr.convert(ours).fused_now) == 3
    for mine, other in zip(ours(image()).feature_maps, model(image()).feature_maps, strict=True):
        assert mine.shape == other.shape


@quick
def test_a_wrong_number_of_channels_is_its_own_error() -> None:
    model = transformers.ResNetModel(config()).eval()
    fr.convert(model)
    with pytest.raises(ValueError, match="channel dimension"):
        model(torch.randn(1, 4, 16, 16))


@quick
def test_other_activations_and_edits() -> None:
    ours = drawn(modeling_resnet.ResNetBasicLayer(8, 8))
    theirs = copy.deepcopy(ours)
    fr.convert(ours)
    for block in (ours, theirs):
        block.activation = nn.SiLU()
    same(ours, theirs, image(8, 5))
    for block in (ours, theirs):
        block.layer[0].register_forward_hook(lambda module, inputs, out: out * 0.5)
    same(ours, theirs, image(8, 5), fused=False)


@quick
def test_a_subclass_is_kept() -> None:
    class Mine(modeling_resnet.ResNetBottleNeckLayer):
        pass

    report = fr.convert(nn.Sequential(Mine(8, 8)))
    assert "Mine is a subclass of" in reasons(report)["0"] and not report.converted


def rt_detr_config(**options: Any) -> Any:
    small = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    return transformers.RTDetrResNetConfig(**small | options)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_rt_detrs_resnet(kind: str) -> None:
    """Three convolutions in the stem, an average pool before the projection."""
    model = drawn(transformers.RTDetrResNetBackbone(rt_detr_config(layer_type=kind, out_features=["stage1", "stage2"])))
    ours = copy.deepcopy(model)
    report = fr.convert(ours)
    assert {name: part for name, part in report.fused_now if part != "one operation"} == {
        "embedder": "fused around MaxPool2d"
    }
    assert len(report.fused_now) == 4 and not report.kept
    x = image(size=32)
    with fr.record_launches() as launches:
        mine, other = (net(x).feature_maps for net in (ours, model))
    assert launches
    for out, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(out, expected)
    for maps in (mine, other):
        sum(out.square().sum() for out in maps).backward()
    for p, q in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind", ["x", "y"])
def test_regnets(kind: str) -> None:
    """A stem without pooling, grouped convolutions; "y": squeeze and excitation between the layers."""
    small = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    model = drawn(transformers.RegNetModel(transformers.RegNetConfig(layer_type=kind, **small)))
    model, report = converted(model, image(size=12), evaluation=False)
    part = "one operation" if kind == "x" else "fused around RegNetSELayer"
    assert report.fused_now == [
        ("embedder", "one operation"),
        *((f"encoder.stages.{i}.layers.0", part) for i in (0, 1)),
    ]
    assert not report.kept


# ---------------------------------------------------------------- DETR's backbones, whose norms are frozen


def frozen_norms() -> list[type[nn.Module]]:
    """transformers' FrozenBatchNorm2d, which every detector of its copies."""
    models = Path(transformers.models.__file__).parent
    files = [file for file in models.glob("*/modeling_*.py") if "FrozenBatchNorm2d(nn.Module)" in file.read_text()]
    modules = (importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}") for file in files)
    return [kind for module in modules for name, kind in vars(module).items() if name.endswith("FrozenBatchNorm2d")]


@quick
def test_every_copy_of_the_frozen_norm_is_read_as_it_computes() -> None:
    """By the eps that stands in its forward."""
    found = frozen_norms()
    assert {"DetrFrozenBatchNorm2d", "ConditionalDetrFrozenBatchNorm2d", "DeformableDetrFrozenBatchNorm2d"} <= {
        kind.__name__ for kind in found
    }
    for kind in found:
        norm = drawn(kind(3))
        norm.running_var.mul_(1e-5)  # as small as the eps
        read = norm_reader(norm)(norm)
        x = image(channels=3, size=4)
        expected = torch.nn.functional.batch_norm(
            x, read.running_mean, read.running_var, read.weight, read.bias, eps=read.eps
        )
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("source", ["transformers", "timm"])
@pytest.mark.parametrize("early", [True, False], ids=["converted, then frozen", "frozen, then converted"])
def test_a_backbone_whose_norms_detr_froze(source: str, early: bool) -> None:
    if source == "timm":
        theirs = pytest.importorskip("timm").create_model("test_resnet", features_only=True, out_indices=(2, 4))
    else:
        theirs = transformers.ResNetBackbone(config(out_features=["stage1", "stage2"]))
    theirs = drawn(theirs)
    ours = copy.deepcopy(theirs)
    if early:
        fr.convert(ours)
    for model in (ours, theirs):
        modeling_detr.replace_batch_norm(model)
        model.double()
    report = fr.convert(ours)
    assert len(report.fused_now) == (4 if source == "timm" else 3) and not report.kept
    same(ours, theirs, image(size=16))


@quick
def test_detr_itself() -> None:
    backbone = config(out_features=["stage2"])
    model = (
        transformers.DetrModel(
            transformers.DetrConfig(
                backbone_config=backbone,
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                num_queries=4,
            )
        )
        .eval()
        .double()
    )
    x = image(size=32)
    expected = model(x).last_hidden_state
    report = fr.convert(model)
    assert len(report.fused_now) == 3 and not report.kept
    torch.testing.assert_close(model(x).last_hidden_state, expected)
