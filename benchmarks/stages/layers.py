"""The vendor's time for every distinct convolution of ResNet-50 and ResNet-18, each pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fused_resnet.launch import vendor
from fused_resnet.plan.config import supports
from fused_resnet.plan.defaults import default_config
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import INTERPRETER, current

from .. import problems
from ..cases import ConvCase
from ..harness import Context, Item
from ..tensors import image, weight
from ..timing import floor_us, interleave, rotation


def chosen(context: Context, depth: int) -> list[problems.Layer]:
    """The distinct convolutions at batch 256; a rehearsal's are tiny."""
    return problems.layers(depth, 2, 32, 8, "float32") if context.dry else problems.layers(depth)


def items(context: Context) -> Iterator[Item]:
    for name, problem in stems(context).items():
        yield name, lambda p=problem: other_stem(context, p)
    seen: set[ConvProblem] = set()
    for depth in (50, 18):
        for layer in chosen(context, depth):
            if layer.problem not in seen:
                seen.add(layer.problem)
                yield layer.name, lambda problem=layer.problem: measure(context, problem)


def stems(context: Context) -> dict[str, ConvProblem]:
    """Other forms of the stem's convolution, whose three channels leave most of a tensor instruction empty."""
    stem = chosen(context, 50)[0].problem
    half = stem.H // 2
    # 2x2 pixels as 12 channels (and 4 of zeros) make the 7x7/2 a 4x4/1: the padding is in the image already.
    folded = replace(stem, H=half + 3, W=half + 3, Ci=16, R=4, S=4, stride=(1, 1), padding=(0, 0))
    return {
        "stem padded to 4": replace(stem, Ci=4),
        "stem padded to 8": replace(stem, Ci=8),
        "stem folded to 4x4 over 16": folded,
        "stem folded to 4x4 over 12": replace(folded, Ci=12),
    }


def other_stem(context: Context, problem: ConvProblem) -> dict[str, Any]:
    """The vendor's time, ours where the kernels take it, and what making the input costs as a plain copy."""
    result = measure(context, problem, dgrad=False)
    target = INTERPRETER if context.dry else current(torch.device("cuda", 0))
    ours = {}
    for case in (ConvCase(problem, "fprop", "stem", stats=True), ConvCase(problem, "wgrad", "stem")):
        assert target is not None
        config = default_config(problem, case.kind, target)
        if not problem.is_stem and supports(problem, case.kind, target, config)[0]:
            t = case.inputs(context.device.name)
            call = interleave(context.device, {"ours": [lambda c=case, t=t, g=config: c.ours(t, g)]}, samples=12)[
                "ours"
            ]
            ours[case.kind] = call.us
    line = result["line"] + "".join(f" | our {kind} {us:.0f} us" for kind, us in ours.items())
    return {**result, "ours_us": ours, "line": line}


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
