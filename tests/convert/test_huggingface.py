"""Hugging Face's ResNets, models of transformers, saved and loaded as always."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from tests.convert.beside import converted, drawn, image, in_interpreter, reasons, same

transformers = pytest.importorskip("transformers")
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
