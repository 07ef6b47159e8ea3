"""Each block of a ResNet-50 and a ResNet-18, forward and backward, by route: eager beside every route of ours.

All in CUDA graphs, turn by turn, so that what the planner's choice between routes is worth can be read off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fused_resnet.plan.route import RouteUnavailableError

from ..harness import Context, Item
from ..modules import BLOCKS, BlockCase, How
from ..timing import interleave

ROUTES = ("auto", "gram", "staged")


def items(context: Context) -> Iterator[Item]:
    for case in BLOCKS:
        yield case.name, lambda c=case: _compare(context, c)  # type: ignore[misc]


def _compare(context: Context, case: BlockCase) -> dict[str, Any]:
    running = {"eager": case.run(How(graph=True), context.device)}
    for route in ROUTES:
        try:
            running[route] = case.run(How(ours=True, graph=True, route=route), context.device)
        except RouteUnavailableError:
            continue
    timings = interleave(context.device, {name: [one.call] for name, one in running.items()}, samples=12, hold=False)
    eager = timings["eager"].us
    line = " | ".join(f"{name} {t.us:.0f} us {eager / t.us:.2f}x" for name, t in timings.items())
    return {"batch": case.batch, "candidates": {name: t.to_dict() for name, t in timings.items()}, "line": line}
