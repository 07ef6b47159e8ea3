"""Each block of a ResNet-50 and a ResNet-18, forward and backward, by route: eager beside every route of ours.

All in CUDA graphs, turn by turn, so that what the planner's choice between routes is worth can be read off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.plan.route import RouteUnavailableError

from ..harness import Context, Item
from ..timing import interleave

BLOCKS: tuple[tuple[str, int, int, int, int], ...] = (
    ("Bottleneck", 256, 64, 1, 56),
    ("Bottleneck", 512, 128, 1, 28),
    ("Bottleneck", 1024, 256, 1, 14),
    ("Bottleneck", 2048, 512, 1, 7),
    ("Bottleneck", 64, 64, 1, 56),
    ("Bottleneck", 256, 128, 2, 56),
    ("Bottleneck", 512, 256, 2, 28),
    ("Bottleneck", 1024, 512, 2, 14),
    ("BasicBlock", 64, 64, 1, 56),
    ("BasicBlock", 128, 128, 1, 28),
    ("BasicBlock", 256, 256, 1, 14),
    ("BasicBlock", 512, 512, 1, 7),
)
"""Class, input channels, planes, stride, side of the input."""
BATCH = 256
ROUTES = ("auto", "gram", "staged")


def items(context: Context) -> Iterator[Item]:
    for kind, inplanes, planes, stride, side in BLOCKS:
        name = f"{kind} {inplanes}, {planes}, /{stride} {side}px"
        yield name, lambda a=(kind, inplanes, planes, stride, side): _compare(context, *a)  # type: ignore[misc]


def _compare(context: Context, kind: str, inplanes: int, planes: int, stride: int, side: int) -> dict[str, Any]:
    batch, dtype = BATCH, torch.bfloat16
    if context.dry:
        batch, dtype, inplanes, planes, side = 2, torch.float32, max(4, inplanes // 32), max(4, planes // 32), 6
    ours = getattr(fr, kind)
    width = planes * ours.expansion
    downsample = None
    if stride != 1 or inplanes != width:
        downsample = nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    plain = getattr(fr.reference, kind)(inplanes, planes, stride, copy.deepcopy(downsample))
    block = ours(inplanes, planes, stride, downsample)
    block.load_state_dict(plain.state_dict())
    x = _image(context, (batch, inplanes, side, side), dtype).requires_grad_()
    out_side = -(-side // stride)
    dout = _image(context, (batch, width, out_side, out_side), dtype)

    calls = {"eager": _capture(context, plain, x, dout, None)}
    for route in ROUTES:
        try:
            calls[route] = _capture(context, copy.deepcopy(block), x, dout, route)
        except RouteUnavailableError:
            continue
    timings = interleave(context.device, {name: [call] for name, call in calls.items()}, samples=12, hold=False)
    eager = timings["eager"].us
    line = " | ".join(f"{name} {t.us:.0f} us {eager / t.us:.2f}x" for name, t in timings.items())
    return {"batch": batch, "candidates": {name: t.to_dict() for name, t in timings.items()}, "line": line}


def _image(context: Context, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    t = torch.randn(shape, device=context.device.name, dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last)


def _capture(context: Context, block: nn.Module, x: torch.Tensor, dout: torch.Tensor, route: str | None) -> Any:
    """A replay of forward and backward; the weights' gradients are new each time."""
    block = block.to(context.device.name).to(memory_format=torch.channels_last).train()
    half = x.dtype == torch.bfloat16
    strict = route not in (None, "auto")

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        autocast = torch.autocast(context.device.name, dtype=x.dtype) if half else nullcontext()
        with fr.use_route(route or "auto", strict=strict), autocast:
            out = block(x)
        out.backward(dout)

    step()  # a route that the block cannot take says so here
    return context.device.capture(step)
