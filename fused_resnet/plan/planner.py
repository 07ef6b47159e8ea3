"""plan(problem, target) -> Plan: the one place that decides what runs, and says why."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from . import store, tables
from .config import GemmConfig, supports
from .defaults import default_config
from .gram_plan import gram_plan, why_not_gram, why_not_gram_projection
from .plans import ChainProblem, Choice, ConvPlan, Plan
from .problem import ConvProblem
from .route import ROUTES
from .single import single_config, why_not_single
from .target import Target, current, why_not

EMPTY_BATCH = "the batch is empty"
PAIR = tables.pass_name("pair", prologue=True)


def plan_chain(problem: ChainProblem, target: Target, route: str = "auto") -> Plan:
    """The plan of a chain of convolutions on ``target``."""
    reason = "asked for" if route == "reference" else _why_not(problem, target)
    if reason:
        return Plan("reference", reason)
    if route == "auto":
        route, reason = _measured_route(problem, target) or (route, "")
        if route == "reference":
            return Plan("reference", reason)
    taken, why = _route(problem, route)
    reason = reason or why
    gram = None
    if taken == "gram":
        projection = problem.projection
        if projection is not None:
            why_staged = why_not_gram_projection(projection, route)
            reason += f"; the projection's does: {why_staged}" if why_staged else ", nor the projection's"
            projection = None if why_staged else projection
        gram = gram_plan(problem.convs[-1], target, projection)
    return Plan(
        route=taken,
        reason=reason,
        gram=gram,
        single=single_config(problem, target) if taken == "single" else None,
        problem=problem,
        convs=tuple(plan_conv(conv, target, first=i == 0) for i, conv in enumerate(problem.convs)),
        projection=plan_conv(problem.projection, target, first=True) if problem.projection else None,
        sm_count=target.sm_count,
        interpreter=target.interpreter,
    )


def _measured_route(problem: ChainProblem, target: Target) -> tuple[str, str] | None:
    """The route that was measured to be the fastest of those that the chain can take, and why. None if none was."""
    measured = None if target.interpreter else tables.routes_of(problem, target)
    if measured is None:
        return None
    refused = ["reference"] if problem.sync else []  # a process must not be the only one to leave the kernels
    refused += [route for route, why in (("single", why_not_single), ("gram", why_not_gram)) if why(problem, route)]
    times = {route: us for route, us in measured.us.items() if route in ROUTES[1:] and route not in refused}
    return (min(times, key=lambda route: times[route]), measured.reason) if times else None


def _route(problem: ChainProblem, asked: str) -> tuple[str, str]:
    """The route of a chain that the kernels take, and why it is that one, or why it is not the one asked for."""
    if asked == "staged":
        return "staged", "the staged route was asked for"
    refusals = {"single": why_not_single(problem, asked), "gram": why_not_gram(problem, asked)}
    taken = next((route for route, refusal in refusals.items() if not refusal), "staged")
    if refusals.get(asked):
        return taken, refusals[asked]
    if taken == "single":
        return taken, "with frozen statistics the whole block is one launch"
    if taken == "gram":
        return taken, "the last convolution widens: its output need not exist"
    return taken, refusals["gram"] if problem.batch_statistics else "; ".join(dict.fromkeys(refusals.values()))


def _why_not(problem: ChainProblem, target: Target) -> str:
    reason = target.why_not_dtype(problem.convs[0].dtype)
    if reason:
        return reason
    for conv in (*problem.convs, *([problem.projection] if problem.projection else ())):
        if conv.M == 0 or conv.N * conv.H * conv.W == 0:
            return EMPTY_BATCH
    return ""


Pair = tuple[int, int]
Geometry = tuple[int, int, int, Pair, Pair, Pair, int]
"""Co, R, S, stride, padding, dilation, groups."""


@torch.compiler.assume_constant_result
def chain_plan_text(
    device: torch.device,
    dtype: str,
    shape: tuple[int, int, int, int],
    convs: tuple[Geometry, ...],
    projection: Geometry | None,
    residual: str,
    relu: bool,
    batch_statistics: bool,
    backward: bool,
    route: str,
    recompute: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    sync: str = "",
) -> tuple[str, str, str]:
    """The encoded plan of a chain over an input of ``shape`` [N, Ci, H, W] ("" for the reference), its route, and why.

    Constants in, constants out: a compiler that traces the caller need not look inside.
    """
    device = torch.device(device)
    if route == "reference":
        return "", "reference", "asked for"
    found = current(device)
    if found is None:
        return "", "reference", why_not(device) or "no target"
    if not found.interpreter:
        store.load()
    problem = (dtype, shape, convs, projection, residual, relu, batch_statistics, backward, recompute, keep, sync)
    return _chain_text(found, route, *problem)


@lru_cache(maxsize=4096)
def _chain_text(found: Target, route: str, *problem: Any) -> tuple[str, str, str]:
    """``problem``: :func:`chain_problem`'s arguments, which unlike what it makes of them cost little to look up."""
    plan = plan_chain(chain_problem(*problem), found, route)
    return ("" if plan.route == "reference" else plan.encode()), plan.route, plan.reason


def chain_problem(
    dtype: str,
    shape: tuple[int, int, int, int],
    convs: tuple[Geometry, ...],
    projection: Geometry | None,
    residual: str,
    relu: bool,
    batch_statistics: bool,
    backward: bool,
    recompute: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    sync: str = "",
) -> ChainProblem:
    """The problem of a chain whose convolutions follow each other over an input of ``shape``."""

    def conv(size: tuple[int, int, int, int], geometry: Geometry) -> ConvProblem:
        n, ci, h, w = size
        co, r, s, stride, padding, dilation, groups = geometry
        return ConvProblem(n, h, w, ci, co, r, s, stride, padding, dilation, groups, dtype)

    size, problems = shape, []
    for geometry in convs:
        problems.append(conv(size, geometry))
        size = (size[0], problems[-1].Co, problems[-1].P, problems[-1].Q)
    shortcut = conv(shape, projection) if projection else None
    return ChainProblem(tuple(problems), shortcut, residual, relu, batch_statistics, backward, recompute, keep, sync)


@torch.compiler.assume_constant_result
def pass_plan(device: torch.device, dtype: str, elements: int, route: str) -> tuple[int, bool, str]:
    """For an operation without a convolution: the target's SM count (0 for the reference route), whether it is the
    interpreter, and the reason."""
    device = torch.device(device)
    if route == "reference":
        return 0, False, "asked for"
    found = current(device)
    if found is None:
        return 0, False, why_not(device) or "no target"
    reason = found.why_not_dtype(dtype) or (EMPTY_BATCH if elements == 0 else "")
    return (0, False, reason) if reason else (found.sm_count, found.interpreter, "the passes take any shape")


@lru_cache(maxsize=4096)
def plan_conv(problem: ConvProblem, target: Target, *, first: bool) -> ConvPlan:
    """Who runs each pass of one convolution; the ``first`` of a chain reads its input as it is, masks no gradient."""
    fprop, dgrad, wgrad = (_choose(problem, kind, target, first) for kind in tables.PASSES)
    if not problem.is_pointwise or target.interpreter:
        return ConvPlan(problem, fprop, dgrad, wgrad)
    return ConvPlan(problem, fprop, *_together(problem, target, first, dgrad, wgrad))


def _together(
    problem: ConvProblem, target: Target, first: bool, dgrad: Choice, wgrad: Choice
) -> tuple[Choice, Choice, bool, GemmConfig | None]:
    """Both gradients of a 1x1, whether one pass forms dy for both (its time is theirs together), and the tile of the
    one kernel that computes both, where that was measured to be the fastest way."""
    on_load, formed = (_both(problem, target, first, formed) for formed in (False, True))
    if not on_load:
        return dgrad, wgrad, False, None
    times = {"ours": sum(entry.us or 0.0 for entry in on_load)}
    if all(entry.vendor_us is not None for entry in on_load):
        times["the vendor's with its passes"] = sum((entry.vendor_us or 0.0) + entry.passes_us for entry in on_load)
    if formed and all(entry.whole_us is not None for entry in formed):
        times["ours from a formed dy, with its pass"] = sum(entry.whole_us or 0.0 for entry in formed)
    paired = _paired(problem, target) if first else None
    if paired is not None:
        times["ours in one kernel"] = paired.us or 0.0
    reason = "measured, both gradients: " + ", ".join(f"{way} {us:.0f} us" for way, us in times.items())
    best = min(times, key=lambda way: times[way])
    if best.startswith("the vendor's"):
        return Choice("vendor", reason), Choice("vendor", reason), False, None
    forms_dy, in_one = best.startswith("ours from"), best.endswith("one kernel")
    fused = (Choice("fused", reason, entry.ours) for entry in (formed if forms_dy else on_load))
    return next(fused), next(fused), forms_dy, paired.ours if paired is not None and in_one else None


def _paired(problem: ConvProblem, target: Target) -> tables.Entry | None:
    """What was measured of both gradients in one kernel, if that fits."""
    entry = tables.lookup(problem, PAIR, target)
    if entry is None or entry.us is None or entry.ours is None:
        return None
    return entry if supports(problem, "pair", target, entry.ours)[0] else None


def _both(problem: ConvProblem, target: Target, first: bool, formed: bool) -> list[tables.Entry]:
    """What was measured of our two gradients; empty where one was not, or does not fit."""
    found = []
    for kind in ("dgrad", "wgrad"):
        entry = tables.lookup(problem, staged_pass(problem, kind, first, formed), target)
        ours = None if entry is None or entry.us is None else entry.ours
        if entry is not None and ours is not None and supports(problem, kind, target, ours, formed=formed)[0]:
            found.append(entry)
    return found if len(found) == 2 else []


def _choose(problem: ConvProblem, kind: str, target: Target, first: bool) -> Choice:
    config = default_config(problem, kind, target)
    ok, reason = supports(problem, kind, target, config)
    if not ok:
        return Choice("vendor", reason)
    if target.interpreter:
        return Choice("fused", "the interpreter has configurations of its own", config)
    measured = tables.lookup(problem, staged_pass(problem, kind, first), target)
    if measured is not None:
        if measured.config is None:
            return Choice("vendor", measured.reason)
        if supports(problem, kind, target, measured.config)[0]:
            return Choice("fused", measured.reason, measured.config)
    if problem.is_stem and kind != "dgrad" and problem.stride[1] % 2 == 0 and problem.dtype != "float32":
        return Choice("fused", "on images of few channels the vendor's takes many times what memory does", config)
    if problem.taps > 1:
        return Choice(
            "vendor", "nobody measured this filter here, and the vendor's is rarely slower on one wider than 1x1"
        )
    return Choice("fused", "a 1x1 convolution gains by its prologue and epilogue", config)


def staged_pass(problem: ConvProblem, kind: str, first: bool, formed: bool = False) -> str:
    """The pass as the staged route runs it: what its prologue and epilogue hold. ``formed``: from a formed dy."""
    if kind == "fprop":
        return tables.pass_name(kind, prologue=problem.is_pointwise and not first, epilogue=True)
    on_load = problem.is_pointwise and not (formed and (first or kind == "dgrad"))
    return tables.pass_name(kind, prologue=on_load, epilogue=kind == "dgrad" and not first, formed=formed)


tables.stale += [plan_conv.cache_clear, _chain_text.cache_clear]
