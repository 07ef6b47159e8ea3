"""Every kernel at the shapes of ResNet-50: first whether it is right, in bfloat16 and float16, then how fast it is.

Each convolution's pass carries the prologue and epilogue of its role in a block. Beside its time stand the floor, the
vendor's convolution alone, and an estimate of that with the passes that it needs besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fused_resnet.launch.record import record_launches
from fused_resnet.plan import tables
from fused_resnet.plan.config import GemmConfig, supports
from fused_resnet.plan.target import INTERPRETER, Target, current

from .. import passes, problems
from ..cases import ConvCase
from ..harness import Context, Item
from ..precompile import Ahead
from ..roles import cases
from ..timing import floor_us, interleave, rotation

CORRECT_BATCH = 32
"""The passes are judged whole, at this batch. Convolutions at 256: the weight gradient whole, of the others the first
and last images."""


def target_of(context: Context) -> Target:
    if context.dry:
        return INTERPRETER
    target = current(torch.device("cuda", 0))
    if target is None:
        raise RuntimeError("the kernels do not run on this GPU")
    return target


def conv_cases(context: Context, depths: tuple[int, ...] = (50,)) -> list[tuple[ConvCase, int]]:
    """Every case with its count, the costliest layers first."""
    found: dict[ConvCase, int] = {}
    for depth in depths:
        layers = problems.layers(depth, 2, 32, 8, "float32")[:9] if context.dry else problems.layers(depth)
        for layer in layers:
            for case in cases(layer):
                found.setdefault(case, layer.count)
    return sorted(found.items(), key=lambda item: -item[1] * problems.conv_bytes(item[0].problem))


def config_for(case: ConvCase, target: Target) -> GemmConfig:
    """What was tuned for this GPU, here or in the shipped table; else the planner's default."""
    entry = tables.lookup(case.problem, case.variant, target)
    ours = None if entry is None else entry.ours
    formed = case.formed or case.gram
    if ours is not None and supports(case.problem, case.kind, target, ours, formed=formed)[0]:
        return ours
    return case.candidates(target)[0]


def items(context: Context) -> Iterator[Item]:
    target = target_of(context)
    todo: list[tuple[Any, Any]] = [(case, case.config(target.sm_count)) for case in passes.cases(context.dry)]
    todo += [(case, config_for(case, target)) for case, _ in conv_cases(context)]
    todo = [(case, config) for case, config in todo if case.name not in context.results]
    ahead = None
    if not context.dry:
        jobs = [(with_dtype(case, dtype), config) for case, config in todo for dtype in ("bfloat16", "float16")]
        ahead = Ahead([(case, config) for case, config in jobs if "finalize" not in case.name], target.sm)
    try:
        for case, config in todo:
            yield case.name, lambda c=case, g=config: _measure(context, c, g, ahead)
    finally:
        if ahead is not None:
            ahead.stop()


def with_dtype(case: Any, dtype: str) -> Any:
    if isinstance(case, passes.PassCase):
        return replace(case, dtype_name=dtype)
    return replace(case, problem=replace(case.problem, dtype=dtype))


def _measure(context: Context, case: Any, config: Any, ahead: Ahead | None) -> dict[str, Any]:
    device, checks = context.device, {}
    is_pass = isinstance(case, passes.PassCase)
    for dtype in ("float32",) if context.dry else ("bfloat16", "float16"):
        judged = with_dtype(case, dtype)
        complaint = ahead.wait(judged, config) if ahead is not None else ""
        if complaint:
            print(f"[kernels] {case.name}, {dtype}, compiled ahead: {complaint[:200]}", flush=True)
        if is_pass:
            judged = replace(judged, N=min(judged.N, CORRECT_BATCH))
        checks[dtype] = judged.check(judged.inputs(device.name), config)
        device.release()
    nbytes = case.rows * case.C * 2 if is_pass else case.bytes
    sets = [case.inputs(device.name) for _ in range(rotation(device, nbytes, limit=8))]
    with record_launches() as launches:
        case.ours(sets[0], config)
    candidates = {"ours": [lambda t=t: case.ours(t, config) for t in sets]}
    if is_pass:
        return _result(context, checks, launches, candidates, config, 0)
    candidates["vendor"] = [lambda t=t: case.vendor(t) for t in sets]
    return _result(context, checks, launches, candidates, config, case.passes_bytes())


def _result(
    context: Context, checks: Any, launches: Any, candidates: Any, config: Any, passes_bytes: int
) -> dict[str, Any]:
    verdicts = [(dtype, name, v) for dtype, found in checks.items() for name, v in found.items()]
    wrong = [f"{dtype} {name} {v['failed']} {v['rms']:.1e} (eager {v.get('eager_rms', 0):.1e})"
             for dtype, name, v in verdicts if not v["ok"]]  # fmt: skip
    nbytes, flops = sum(entry.bytes for entry in launches), sum(entry.flops for entry in launches)
    floor = floor_us(context.ceilings, nbytes, flops)
    result = {"checks": checks, "ok": not wrong, "config": config.to_dict(), "bytes": nbytes, "flops": flops,
              "floor_us": floor}  # fmt: skip
    if wrong:
        # A red check prints no speed.
        return {**result, "line": "WRONG " + "; ".join(wrong)}
    timings = interleave(context.device, candidates, samples=12)
    ours = timings["ours"]
    result |= {"ours": ours.to_dict(), "ratio": ours.us / floor}
    worst = max((v["rms"] / v["eager_rms"] for *_, v in verdicts if v.get("eager_rms")), default=0.0)
    line = f"{ours.us:.0f} us, floor {floor:.0f} ({ours.us / floor:.2f}x)"
    if "vendor" in timings:
        extra = passes_bytes / (0.9 * context.ceilings["bytes_per_s"]) * 1e6
        result |= {"vendor": timings["vendor"].to_dict(), "passes_us": extra}
        line += f", vendor {timings['vendor'].us:.0f} + passes {extra:.0f}"
    return {**result, "line": f"{line}, error {worst:.2f}x eager's"}


def finish(context: Context) -> None:
    """What is wrong, what is slow, and ours against the vendor's over the whole network."""
    wrong = [name for name, r in context.results.items() if "error" in r or r.get("ok") is False]
    timed = {name: r for name, r in context.results.items() if "ours" in r}
    slow = sorted((name for name, r in timed.items() if r["ratio"] > 1.5), key=lambda name: -timed[name]["ratio"])
    totals = {"ours": 0.0, "vendor": 0.0, "vendor + passes": 0.0, "floor": 0.0}
    for case, count in conv_cases(context):
        r = timed.get(case.name)
        if r is not None and "vendor" in r:
            totals["ours"] += count * r["ours"]["us"]
            totals["vendor"] += count * r["vendor"]["us"]
            totals["vendor + passes"] += count * (r["vendor"]["us"] + r["passes_us"])
            totals["floor"] += count * r["floor_us"]
    context.document |= {"wrong": wrong, "over_1.5x_floor": slow, "totals_us": totals}
    print(f"[kernels] wrong or failed: {', '.join(wrong) or 'none'}", flush=True)
    print(f"[kernels] over 1.5x their floor: {', '.join(slow) or 'none'}", flush=True)
    print("[kernels] all convolutions, ms: " + ", ".join(f"{k} {v / 1e3:.2f}" for k, v in totals.items()), flush=True)
