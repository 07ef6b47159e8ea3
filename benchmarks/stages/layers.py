"""The vendor's time for every distinct convolution of ResNet-50 and ResNet-18, each pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fused_resnet.launch import vendor
from fused_resnet.plan.problem import ConvProblem

from .. import problems
from ..harness import Context, Item
from ..tensors import image, weight
from ..timing import floor_us, interleave, rotation


def chosen(context: Context, depth: int) -> list[problems.Layer]:
    """The distinct convolutions at batch 256; a rehearsal's are tiny."""
    return problems.layers(depth, 2, 32, 8, "float32") if context.dry else problems.layers(depth)


def items(context: Context) -> Iterator[Item]:
    for channels in (4, 8):
        yield f"stem padded to {channels}", lambda c=channels: padded_stem(context, c)
    seen: set[ConvProblem] = set()
    for depth in (50, 18):
        for layer in chosen(context, depth):
            if layer.problem not in seen:
                seen.add(layer.problem)
                yield layer.name, lambda problem=layer.problem: measure(context, problem)


def padded_stem(context: Context, channels: int) -> dict[str, Any]:
    """The stem's convolution on images padded to ``channels``, and what the padding itself costs."""
    stem = chosen(context, 50)[0].problem
    result = measure(context, replace(stem, Ci=channels), dgrad=False)
    x = image(stem.N, 3, stem.H, stem.W, stem.dtype, context.device.name)
    timing = interleave(context.device, {"pad": [lambda: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, channels - 3))]})[
        "pad"
    ]
    return {**result, "pad_us": timing.us, "line": f"{result['line']} | padding {timing.us:.0f} us"}


def calls(problem: ConvProblem, device: str, sets: int) -> dict[str, list[Any]]:
    """The vendor's three passes over ``sets`` sets of inputs."""
    xs = [image(problem.N, problem.Ci, problem.H, problem.W, problem.dtype, device) for _ in range(sets)]
    dys = [image(problem.N, problem.Co, problem.P, problem.Q, problem.dtype, device) for _ in range(sets)]
    w = weight(problem, device)
    return {
        "fprop": [lambda x=x: vendor.conv_fprop(x, w, problem) for x in xs],
        "dgrad": [lambda x=x, dy=dy: vendor.conv_dgrad(dy, x, w, problem) for x, dy in zip(xs, dys, strict=True)],
        "wgrad": [lambda x=x, dy=dy: vendor.conv_wgrad(x, dy, w, problem) for x, dy in zip(xs, dys, strict=True)],
    }


def measure(context: Context, problem: ConvProblem, dgrad: bool = True) -> dict[str, Any]:
    nbytes = problems.conv_bytes(problem, torch.finfo(getattr(torch, problem.dtype)).bits // 8)
    candidates = calls(problem, context.device.name, rotation(context.device, nbytes))
    if problem.Ci == 3 or not dgrad:
        del candidates["dgrad"]  # the images need no gradient
    floor = floor_us(context.ceilings, nbytes, problem.flops)
    passes = {}
    for name, timing in interleave(context.device, candidates, samples=12).items():
        passes[name] = {**timing.to_dict(), "floor_us": floor, "ratio": timing.us / floor}
    line = " ".join(f"{name} {r['us']:.0f} us ({r['ratio']:.2f})" for name, r in passes.items())
    limit = "bytes" if nbytes / context.ceilings["bytes_per_s"] * 1e6 >= floor else "flops"
    return {"problem": vars(problem), "bytes": nbytes, "flops": problem.flops, "floor_us": floor, "limit": limit,
            "passes": passes, "line": f"{line} | floor {floor:.0f} us, {limit}"}  # fmt: skip


def finish(context: Context) -> None:
    """Whole networks: the sum over the layers, times how often each occurs."""
    for depth in (50, 18):
        total = {"fprop": 0.0, "dgrad": 0.0, "wgrad": 0.0}
        floor = dict(total)
        for layer in chosen(context, depth):
            for name, r in context.results.get(layer.name, {}).get("passes", {}).items():
                total[name] += layer.count * r["us"]
                floor[name] += layer.count * r["floor_us"]
        context.document.setdefault("totals", {})[f"resnet{depth}"] = {"us": total, "floor_us": floor}
        line = " ".join(f"{name} {us / 1e3:.2f} ms (floor {floor[name] / 1e3:.2f})" for name, us in total.items())
        print(f"[layers] resnet{depth}, all convolutions: {line}", flush=True)
