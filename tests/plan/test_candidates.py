"""The configurations worth measuring."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks import problems
from fused_resnet.plan.candidates import MOST, candidates, projection_candidates
from fused_resnet.plan.config import supports
from fused_resnet.plan.defaults import default_config
from fused_resnet.plan.target import A100, H100

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("depth", [18, 50])
def test_every_layer_has_some_and_each_is_supported(depth: int) -> None:
    for layer in problems.layers(depth)[1:]:  # the stem's have kernels of their own, below
        for kind in ("fprop", "dgrad", "wgrad"):
            found = candidates(layer.problem, kind, H100)
            assert 4 <= len(found) == len(set(found)) <= MOST
            assert found[0] == default_config(layer.problem, kind, H100)
            assert all(supports(layer.problem, kind, H100, config)[0] for config in found)
            assert kind == "wgrad" or all(config.split == 1 or config.form == "walk" for config in found)


def test_a_3x3_of_stride_1_is_also_measured_in_boxes() -> None:
    for layer in problems.layers(50)[1:]:
        for kind in ("fprop", "dgrad", "wgrad"):
            forms = Counter(config.form for config in candidates(layer.problem, kind, H100))
            assert (forms["box"] >= 3) == layer.problem.is_same_3x3
            assert (forms["walk"] > 0) == (layer.problem.is_same_3x3 and layer.problem.Ci == 64 and kind != "wgrad")
            assert forms["rows"] > 4
            assert {config.form for config in candidates(layer.problem, kind, A100)} == {"rows"}


def test_a_product_that_a_projection_joins_has_some() -> None:
    for layer in problems.layers(50)[1:]:
        if layer.role == "conv3":
            found = projection_candidates(layer.problem, H100)
            assert 4 <= len(found) == len(set(found)) <= MOST
            assert found[0] == default_config(layer.problem, "fprop", H100, epilogue="projection")
            assert all(supports(layer.problem, "fprop", H100, config)[0] for config in found)


def test_the_stem_s_take_whole_runs() -> None:
    stem = problems.layers(50)[0].problem
    forward, backward = (candidates(stem, kind, H100) for kind in ("fprop", "wgrad"))
    assert all(config.block_k % stem.run == 0 for config in forward) and len(forward) == len(set(forward)) > 4
    assert backward[0].block_n >= stem.R * stem.run and len(backward) == len(set(backward)) > 4


def test_the_layers_are_those_of_the_network() -> None:
    torchvision = pytest.importorskip("torchvision")
    for depth in (18, 50):
        model = getattr(torchvision.models, f"resnet{depth}")()
        counted: Counter[tuple[int, ...]] = Counter()

        def count(m: Any, inputs: Any, out: Any, counted: Counter[tuple[int, ...]] = counted) -> None:
            counted[(*inputs[0].shape, *out.shape, *m.kernel_size, *m.stride, *m.padding)] += 1

        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        with torch.no_grad(), torch.device("meta"):
            model.to("meta")(torch.empty(2, 3, 224, 224))
        ours: Counter[tuple[int, ...]] = Counter()
        for layer in problems.layers(depth, batch=2):
            p = layer.problem
            ours[(2, p.Ci, p.H, p.W, 2, p.Co, p.P, p.Q, p.R, p.S, *p.stride, *p.padding)] += layer.count
        assert ours == counted
