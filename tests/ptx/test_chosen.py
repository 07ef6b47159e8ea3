"""Bottlenecks that nobody measured, with what the cost model chooses for them, compiled and run on the CPU.

Run where ``FUSED_RESNET_EMULATE`` names a compute capability (tests/test_compiled.py does): what a GPU without a table
is given at once. A few of them; with ``FUSED_RESNET_CHOSEN=all`` every block of ResNet-50 and of its wide one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fused_resnet.launch.record import record_launches
from fused_resnet.plan import planner, tables
from fused_resnet.plan.plans import ChainProblem, Plan
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import Target
from tests.conftest import EMULATED
from tests.whole_block import bottleneck

pytestmark = pytest.mark.skipif(not EMULATED, reason="FUSED_RESNET_EMULATE names no compute capability")

Shape = tuple[int, int, int, int]
"""Input channels, width, output channels, stride."""

RESNET: list[Shape] = [(64, 64, 256, 1), (256, 64, 256, 1)]
RESNET += [block for c in (256, 512, 1024) for block in ((c, c // 2, 2 * c, 2), (2 * c, c // 2, 2 * c, 1))]
WIDE = [(ci, 2 * width, co, stride) for ci, width, co, stride in RESNET]
N, P, Q = 3, 7, 7
"""Of the output: rows that fill no last tile."""
TIMES = (1, 30, 1000)
"""A plan is for so many times as many images."""
EVERY = itertools.product(RESNET + WIDE, TIMES, (torch.bfloat16, torch.float16), ("auto", "staged"))
FEW = [
    ((64, 128, 256, 1), 1000, torch.float16, "auto"),
    ((512, 128, 512, 1), 1000, torch.bfloat16, "auto"),
    ((256, 128, 512, 1), 1000, torch.bfloat16, "staged"),
]
CASES = list(EVERY) if os.environ.get("FUSED_RESNET_CHOSEN") == "all" else FEW


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One number: plans are made for so many times as many images as there are, and no table is asked."""
    plan_chain, factor = planner.plan_chain, [1]

    def more(conv: ConvProblem) -> ConvProblem:
        return replace(conv, N=factor[0] * conv.N)

    def planned(problem: ChainProblem, target: Target, route: str = "auto") -> Plan:
        shortcut = problem.projection
        large = replace(problem, convs=tuple(map(more, problem.convs)), projection=shortcut and more(shortcut))
        plan = plan_chain(large, target, route)
        convs = (replace(conv, problem=real) for conv, real in zip(plan.convs, problem.convs, strict=True))
        projection = replace(plan.projection, problem=shortcut) if plan.projection and shortcut else None
        return replace(plan, problem=problem, convs=tuple(convs), projection=projection)

    monkeypatch.setattr(planner, "plan_chain", planned)
    monkeypatch.setattr(tables, "lookup", lambda *_: None)
    tables.forget_plans()
    yield factor
    tables.forget_plans()


@pytest.mark.parametrize(("shape", "factor", "dtype", "route"), CASES, ids=str)
def test_what_the_cost_model_chooses(
    shape: Shape, factor: int, dtype: torch.dtype, route: str, times: list[int]
) -> None:
    ci, width, co, stride = shape
    times[0] = factor
    size = N, stride * P - 1 + stride % 2, stride * Q  # strided: 13 by 14
    with record_launches() as launches:
        bottleneck(dtype, ci, width, co, stride, size).check(route, strict=False)
    assert sum(not launch.kernel.startswith("vendor") for launch in launches) > 10
