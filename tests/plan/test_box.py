"""Boxes of pixels, and who takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fused_resnet.plan.box import Box, any_box, exact_box, row_box
from fused_resnet.plan.config import GemmConfig, supports
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import A100, H100

pytestmark = pytest.mark.quick

WIDE = ConvProblem(256, 56, 56, 64, 64, 3, 3, padding=(1, 1))


def of(size: int, images: int = 256) -> ConvProblem:
    return replace(WIDE, N=images, H=size, W=size)


def test_a_box_touches_few_neighbours() -> None:
    assert [exact_box(of(size), 128) for size in (56, 28, 14, 7)] == [
        Box(2, 8, 8),
        Box(8, 4, 4),
        Box(32, 2, 2),
        Box(128, 1, 1),
    ]
    assert [row_box(of(size), 64) for size in (56, 7)] == [Box(8, 1, 8), Box(64, 1, 1)]
    assert exact_box(of(7, images=32), 128) is None and exact_box(of(56, images=1), 64) == Box(1, 8, 8)


def test_any_box_covers_the_batch() -> None:
    for problem in (of(56), of(7, images=3), of(1, images=1)):
        box = any_box(problem, 64)
        assert box.n * box.h * box.w == 64
        assert box.count(problem) * 64 >= problem.M
    assert any_box(of(7), 64).count(of(7)) * 64 == of(7).M, "exact where it can be"


@pytest.mark.parametrize(
    ("kind", "problem", "config", "target", "reason"),
    [
        ("fprop", WIDE, GemmConfig(128, 64, 64, form="box"), H100, ""),
        ("dgrad", WIDE, GemmConfig(64, 64, 64, 4, 2, form="walk"), H100, ""),
        ("wgrad", WIDE, GemmConfig(64, 64, 64, row_taps=9, form="box"), H100, ""),
        ("fprop", WIDE, GemmConfig(128, 64, 64, form="box"), A100, "sm_90"),
        ("fprop", replace(WIDE, stride=(2, 2)), GemmConfig(128, 64, 64, form="box"), H100, "stride 1"),
        ("fprop", replace(WIDE, N=3, H=7), GemmConfig(128, 64, 64, form="box"), H100, "no box"),
        ("fprop", replace(WIDE, Co=60), GemmConfig(128, 64, 64, form="box"), H100, "16 bytes"),
        ("fprop", replace(WIDE, Ci=128), GemmConfig(64, 64, 64, form="walk"), H100, "128 channels, in steps of 64"),
        ("dgrad", replace(WIDE, Co=128), GemmConfig(64, 64, 128, 4, 2, form="walk"), H100, "shared memory"),
        ("fprop", replace(WIDE, Co=192), GemmConfig(128, 128, 64, form="box"), H100, "64 are none of 192"),
        ("dgrad", replace(WIDE, Ci=320), GemmConfig(128, 256, 64, form="box"), H100, "192 are none of 320"),
        ("fprop", replace(WIDE, Co=200), GemmConfig(128, 128, 64, form="box"), H100, ""),
        ("fprop", WIDE, GemmConfig(64, 64, 64, 4, 2, transposed=True, form="walk"), H100, "pixels by channels"),
        ("wgrad", WIDE, GemmConfig(64, 64, 64, row_taps=2, form="box"), H100, "1, 3 or 9 taps"),
        ("wgrad", WIDE, GemmConfig(64, 64, 64, 8, 8, row_taps=9, form="box"), H100, "shared memory"),
        ("wgrad", WIDE, GemmConfig(64, 64, 64, row_taps=9), H100, "9 taps"),
    ],
)
def test_who_takes_boxes(kind: str, problem: ConvProblem, config: GemmConfig, target: object, reason: str) -> None:
    ok, why = supports(problem, kind, target, config)  # type: ignore[arg-type]
    assert ok == (not reason) and reason in why
