"""The single route: who takes it and who does not, and that it computes what the staged route and eager PyTorch do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.explain import explain
from fused_resnet.functional import batch_norm_of, conv_bn_chain, conv_of
from fused_resnet.plan import single, tables
from tests import numerics
from tests.conftest import INTERPRETED
from tests.eager import Chain, compare, pair

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")
quick = pytest.mark.quick
KERNEL = "bottleneck_single_kernel"


def block(kind: str = "identity", stride: int = 1, width: int = 5, relu: bool = True, **options: Any) -> Chain:
    """A bottleneck in eval mode whose parameters want gradients; sizes that fill no tile."""
    last = 7 if kind == "identity" else 10
    pairs = [
        pair(7, width, 1, training=False, **options),
        pair(width, width, 3, stride=stride, padding=1, training=False, **options),
        pair(width, last, 1, training=False, **options),
    ]
    x, size = torch.randn(1, 7, 18, 9, dtype=torch.float64), (-(-18 // stride), -(-9 // stride))
    projection = pair(7, last, 1, stride=stride, training=False, **options) if kind == "projection" else None
    residual = torch.randn(1, last, *size, dtype=torch.float64) if kind == "given" else None
    return Chain(x, pairs, kind, projection, residual, relu, route="single")


@quick
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
def test_every_shortcut(kind: str, stride: int, relu: bool) -> None:
    if kind == "identity" and stride > 1:
        pytest.skip("a strided block has no identity")
    with torch.no_grad(), fr.record_launches() as launches:
        compare(block(kind, stride, relu=relu), backward=False)
    assert [launch.kernel for launch in launches if "cast" not in launch.kernel] == [KERNEL]


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.5}])
def test_batch_norm_variants(options: dict[str, Any]) -> None:
    with torch.inference_mode():
        compare(block("projection", **options), backward=False)


@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_the_rule_beside_the_staged_route(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At p = 64, one image: no further from float64 than eager allows, and no further than the staged route."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ci, co = (24, 24) if kind == "identity" else (20, 36)
    pairs = [
        pair(ci, 64, 1, training=False),
        pair(64, 64, 3, padding=1, training=False),
        pair(64, co, 1, training=False),
    ]
    projection = pair(ci, co, 1, training=False) if kind == "projection" else None
    x = torch.randn(1, ci, 13, 17, dtype=torch.float64).to(dtype)
    results = {}
    for name, to in (("eager", dtype), ("oracle", torch.float64), ("single", dtype), ("staged", dtype)):
        case = Chain(x.to(to), pairs, kind, projection, route=name).copied()
        for conv, bn in (*case.pairs, *([case.projection] if case.projection else [])):
            conv.weight.data = conv.weight.data.to(dtype).to(to)
            bn.to(torch.float64 if to == torch.float64 else torch.float32)
        with torch.no_grad():
            results[name] = case.fused() if name in ("single", "staged") else case.eager()
    numerics.check(results["single"], results["eager"], results["oracle"], "z")
    numerics.check(results["single"], results["staged"], results["oracle"], "z beside staged")


def refusal(case: Chain, match: str) -> None:
    """Strictly asked for, the route is refused with the reason; otherwise another runs, and computes the same."""
    with pytest.raises(fr.RouteUnavailableError, match=f"'single'.*{match}"):
        case.fused()
    case.route = None
    with fr.use_route("single"), fr.record_launches() as launches:
        compare(case)
    assert launches and KERNEL not in {launch.kernel for launch in launches}


@quick
def test_who_does_not_take_it_and_why() -> None:
    refusal(block(), "keeps nothing for a backward pass")
    with torch.no_grad():
        refusal(block(width=65), "up to 64 wide, not 65")
        batch = block()
        for _, bn in batch.pairs:
            bn.train()
        refusal(batch, "batch statistics")
        two = block("none")
        refusal(replace(two, pairs=two.pairs[:2]), "takes a bottleneck")
        grouped = block("none")
        grouped.pairs[1] = pair(5, 5, 3, padding=1, groups=5, training=False)
        refusal(grouped, "ungrouped")
        dilated = block("none")
        dilated.pairs[1] = pair(5, 5, 3, padding=2, dilation=2, training=False)
        refusal(dilated, "padding of 1")
        wider = block("none")
        wider.pairs[1:] = [pair(5, 6, 3, padding=1, training=False), pair(6, 10, 1, training=False)]
        refusal(wider, "as many channels out as in")


@quick
def test_auto_takes_it_where_it_was_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert single.GAINFUL_SINGLE_WIDTH == 0, "a record under benchmarks/records/ says what one launch gains"
    case = block()
    case.route = "auto"
    with torch.no_grad(), fr.record_launches() as launches:
        case.fused()
    assert KERNEL not in {launch.kernel for launch in launches}

    monkeypatch.setattr(single, "GAINFUL_SINGLE_WIDTH", 64)
    tables.forget_plans()
    with torch.no_grad(), fr.record_launches() as launches:
        case.fused()
    tables.forget_plans()
    assert [launch.kernel for launch in launches if "cast" not in launch.kernel] == [KERNEL]


@quick
def test_explain_counts_what_is_recorded() -> None:
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    model = nn.Sequential(fr.Bottleneck(16, 8, 1, projection), fr.Bottleneck(32, 8)).eval()
    x = torch.randn(2, 16, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), fr.use_route("single"):
        explanation = explain(model, example_input=x, dtype=torch.float32, training=False)
        with fr.record_launches() as launches:
            model(x)
    assert [launch.kernel for launch in launches if "cast" not in launch.kernel] == [KERNEL] * 2
    assert (explanation.flops, explanation.bytes) == tuple(
        sum(getattr(launch, name) for launch in launches) for name in ("flops", "bytes")
    )
    assert {(row.source, row.route) for row in explanation.rows} == {("fused", "single")}


@quick
def test_on_a_gpu_it_reads_x_and_writes_out() -> None:
    with torch.device("meta"):
        model = fr.Bottleneck(256, 64).eval().to(memory_format=torch.channels_last)
        x = torch.empty(256, 256, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def ours(route: str) -> tuple[int, str]:
        with fr.use_route(route):
            rows = explain(model, example_input=x, target="h100", training=False).rows
        rows = [row for row in rows if row.source in ("fused", "vendor")]
        return sum(row.bytes for row in rows), rows[0].reason

    image = 2 * 256 * 256 * 56 * 56
    (one, why), (staged, why_not) = ours("single"), ours("auto")
    assert 2 * image < one < 2.05 * image and one < 0.51 * staged
    assert "one launch" in why and "was not measured" in why_not


def test_a_residual_of_its_own_and_autocast() -> None:
    case = block("given")
    layers = [(conv_of(conv), batch_norm_of(bn)) for conv, bn in case.pairs]
    with torch.no_grad():
        expected = case.eager()
        out = conv_bn_chain(case.x.contiguous(), layers, residual=case.residual.contiguous(), route="single")
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
