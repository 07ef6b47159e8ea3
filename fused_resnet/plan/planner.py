"""plan(problem, target) -> Plan: the one place that decides what runs, and says why."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from . import tables
from .config import GemmConfig, supports
from .gram import gram_config
from .gram_dgrad import gram_dgrad_config
from .gram_wgrad import gram_wgrad_config
from .plans import ChainProblem, Choice, ConvPlan, GramPlan, GramProjection, Plan
from .problem import ConvProblem
from .single import single_config, why_not_single
from .split import ELEMENT_BYTES, wgrad_split
from .target import Target, current, why_not


def plan_chain(problem: ChainProblem, target: Target, route: str = "auto") -> Plan:
    """The plan of a chain of convolutions on ``target``."""
    reason = "asked for" if route == "reference" else _why_not(problem, target)
    if reason:
        return Plan("reference", reason)
    taken, reason = _route(problem, route)
    gram = None
    if taken == "gram":
        projection = problem.projection
        if projection is not None:
            why_staged = _why_not_gram_projection(projection, route)
            reason += f"; the projection's does: {why_staged}" if why_staged else ", nor the projection's"
            projection = None if why_staged else projection
        gram = _gram_plan(problem.convs[-1], target, projection)
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


def _route(problem: ChainProblem, asked: str) -> tuple[str, str]:
    """The route of a chain that the kernels take, and why it is that one, or why it is not the one asked for."""
    if asked == "staged":
        return "staged", "the staged route was asked for"
    refusals = {"single": why_not_single(problem, asked), "gram": _why_not_gram(problem, asked)}
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
            return "the batch is empty"
    return ""


MOST_GRAM_WIDTH = 512
"""A wider Gram matrix costs more than the output it saves (half of the convolution's own products at 1024)."""
GAINFUL_GRAM_WIDTH = 256
"""Up to here the Gram route is the faster one on an H100; at 512 the vendor's convolutions and the passes are. For a
projection's input, where the route itself was not timed, so much follows from the times of its parts."""
LEAST_GRAM_ROWS = 8


def _why_not_gram(problem: ChainProblem, route: str) -> str:
    """Why the chain's last convolution writes its output, or "" where it need not."""
    last = problem.convs[-1]
    if len(problem.convs) < 2 or not last.is_gemm or last.Co <= last.Ci:
        return "the last convolution is not a 1x1 that widens: its output exists"
    if not problem.batch_statistics:
        return "with frozen statistics the normalisation is the convolution's epilogue already"
    if not problem.relu:
        return "without a ReLU at its end a chain is staged"
    if last.Ci > _most_width(route):
        return f"a Gram matrix {last.Ci} wide costs more than it saves"
    if last.dtype == "float32" and route != "gram":
        return "in float32 sums that subtract the mean first are more exact than a Gram matrix"
    if last.M < LEAST_GRAM_ROWS:
        return f"{last.M} rows are too few for a covariance"
    return ""


def _why_not_gram_projection(projection: ConvProblem, route: str) -> str:
    """Why a projection writes its output on the Gram route, or "" where it need not."""
    if not projection.is_pointwise or projection.groups != 1 or projection.Co <= projection.Ci:
        return "it is not a 1x1 that widens"
    if projection.Ci > _most_width(route):
        return f"a Gram matrix {projection.Ci} wide costs more than it saves"
    return ""


def _most_width(route: str) -> int:
    return MOST_GRAM_WIDTH if route == "gram" else GAINFUL_GRAM_WIDTH


def _gram_plan(last: ConvProblem, target: Target, projection: ConvProblem | None = None) -> GramPlan:
    stores_a = _stores_a(last, target, joined=projection is not None)
    fprop = _fprop_name(stores_a, joined=projection is not None)
    stores_dz = _stores_dz(last, target)
    dgrad = "dgrad+gram" if stores_dz else "dgrad+in+gram"
    return GramPlan(
        gram=_measured(last, "gram", target, _gram_config(last, target)),
        fprop=_measured(last, fprop, target, default_config(last, "fprop", target)),
        wgrad=_measured(last, "wgrad+in+gram", target, default_config(last, "wgrad", target)),
        masked_wgrad=_masked_wgrad(last, target),
        dgrad=_measured(last, dgrad, target, _gram_dgrad_config(last, target)),
        projection=None if projection is None else _gram_projection(projection, target),
        stores_a=stores_a,
        stores_dz=stores_dz,
    )


LEAST_STORED_WIDTH = 256
"""From here on so many tiles of output channels read the same input that forming it once should be faster: estimated
from the kernels' instructions, not measured."""


def _stores_a(last: ConvProblem, target: Target, joined: bool) -> bool:
    """Whether the Gram kernel writes a. ``joined``: fprop takes a projection as a second product."""
    formed, on_load = (tables.lookup(last, _fprop_name(stores, joined), target) for stores in (True, False))
    if formed is not None and formed.whole_us is not None and on_load is not None and on_load.us is not None:
        return formed.whole_us < on_load.us
    return last.Ci >= LEAST_STORED_WIDTH


def _stores_dz(last: ConvProblem, target: Target) -> bool:
    """Whether the weight gradient writes the dz that it forms. So it does until both were measured."""
    written, on_load = (tables.lookup(last, name, target) for name in ("dgrad+gram", "dgrad+in+gram"))
    if written is None or written.whole_us is None or on_load is None or on_load.us is None:
        return True
    return written.whole_us <= on_load.us


def _fprop_name(stores_a: bool, joined: bool) -> str:
    return tables.pass_name("fprop", prologue=not stores_a, gram=not joined, gram2=joined, formed=stores_a)


def _gram_projection(projection: ConvProblem, target: Target) -> GramProjection:
    return GramProjection(
        gram=_measured(projection, "gram", target, _gram_config(projection, target)),
        wgrad=_measured(projection, "wgrad+gram2", target, default_config(projection, "wgrad", target)),
        dgrad=_measured(projection, "dgrad+gram2", target, _gram_dgrad_config(projection, target)),
    )


def _gram_config(conv: ConvProblem, target: Target) -> GemmConfig:
    itemsize = ELEMENT_BYTES.get(conv.dtype, 2)
    return gram_config(
        conv.M, conv.Ci, target.sm_count, itemsize=itemsize, interpreter=target.interpreter, sm=target.sm
    )


def _gram_dgrad_config(conv: ConvProblem, target: Target) -> GemmConfig:
    return gram_dgrad_config(conv.M, conv.Ci, conv.Co, target, itemsize=ELEMENT_BYTES.get(conv.dtype, 2))


MOST_MASKED_WIDTH = 128
"""Up to here the weight gradient that forms dz on load is bound by memory, and saves reading dz."""


def _masked_wgrad(last: ConvProblem, target: Target) -> GemmConfig | None:
    """The weight gradient that forms dz, or None where a pass and the plain weight gradient are faster."""
    whole, parts = (tables.lookup(last, name, target) for name in ("wgrad+in+out+gram", "wgrad+in+gram"))
    if whole is not None and whole.us is not None and parts is not None and parts.whole_us is not None:
        masked = whole.us <= parts.whole_us
    else:
        masked = last.Ci <= MOST_MASKED_WIDTH or target.interpreter
    return _measured(last, "wgrad+in+out+gram", target, gram_wgrad_config(last, target)) if masked else None


def _measured(problem: ConvProblem, pass_: str, target: Target, default: GemmConfig) -> GemmConfig:
    entry, kind = tables.lookup(problem, pass_, target), pass_.partition("+")[0]
    if entry is not None and entry.ours is not None and supports(problem, kind, target, entry.ours, formed=True)[0]:
        return entry.ours
    return default


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
    problem = (dtype, shape, convs, projection, residual, relu, batch_statistics, backward, recompute, keep)
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
    return ChainProblem(tuple(problems), shortcut, residual, relu, batch_statistics, backward, recompute, keep)


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
    reason = found.why_not_dtype(dtype) or ("the batch is empty" if elements == 0 else "")
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
) -> tuple[Choice, Choice, bool]:
    """Both gradients of a 1x1, and whether one pass forms dy for both: its time is theirs together."""
    on_load, formed = (_both(problem, target, first, formed) for formed in (False, True))
    if not on_load:
        return dgrad, wgrad, False
    times = {"ours": sum(entry.us or 0.0 for entry in on_load)}
    if all(entry.vendor_us is not None for entry in on_load):
        times["the vendor's with its passes"] = sum((entry.vendor_us or 0.0) + entry.passes_us for entry in on_load)
    if formed and all(entry.whole_us is not None for entry in formed):
        times["ours from a formed dy, with its pass"] = sum(entry.whole_us or 0.0 for entry in formed)
    reason = "measured, both gradients: " + ", ".join(f"{way} {us:.0f} us" for way, us in times.items())
    best = min(times, key=lambda way: times[way])
    if best.startswith("the vendor's"):
        return Choice("vendor", reason), Choice("vendor", reason), False
    fused = (Choice("fused", reason, entry.ours) for entry in (on_load if best == "ours" else formed))
    return next(fused), next(fused), best != "ours"


def _both(problem: ConvProblem, target: Target, first: bool, formed: bool) -> list[tables.Entry]:
    """What was measured of our two gradients; empty where one was not, or does not fit."""
    found = []
    for kind in ("dgrad", "wgrad"):
        entry = tables.lookup(problem, _pass_name(problem, kind, first, formed), target)
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
    measured = tables.lookup(problem, _pass_name(problem, kind, first), target)
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


def _pass_name(problem: ConvProblem, kind: str, first: bool, formed: bool = False) -> str:
    """The pass as the staged route runs it: what its prologue and epilogue hold. ``formed``: from a formed dy."""
    if kind == "fprop":
        return tables.pass_name(kind, prologue=problem.is_pointwise and not first, epilogue=True)
    on_load = problem.is_pointwise and not (formed and (first or kind == "dgrad"))
    return tables.pass_name(kind, prologue=on_load, epilogue=kind == "dgrad" and not first, formed=formed)


def default_config(problem: ConvProblem, kind: str, target: Target) -> GemmConfig:
    """The configuration of a problem that nobody measured."""
    if target.interpreter:
        return _interpreter_config(problem, kind)
    if problem.is_stem and kind != "dgrad":
        return _stem_config(problem, kind, target)
    if kind == "wgrad":
        block_m, block_n = _tile(problem.Co), _tile(problem.Ci)
        row_taps = 3 if problem.S == 3 and block_m * block_n <= 64 * 64 else 1
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        block_k = 32 if problem.dtype == "float32" or (row_taps == 3 and target.sm < 90) else 64
        split = wgrad_split(problem, block_m, block_n, block_k, target.sm_count, row_taps)
        return GemmConfig(block_m, block_n, block_k, num_warps=warps, num_stages=3, split=split, row_taps=row_taps)
    columns = problem.Co if kind == "fprop" else problem.Ci
    reduced = problem.Ci if kind == "fprop" else problem.Co
    block_n = _tile(columns)
    # A wider step would not fit the registers of float32, nor of a dgrad's two operands without wgmma.
    narrow = problem.dtype == "float32" or (kind == "dgrad" and target.sm < 90)
    block_k = 32 if narrow or reduced <= 32 else 64
    # Registers and shared memory for two or three programs on a processor: one's loads, another's products.
    if kind == "dgrad":
        return GemmConfig(
            64 if block_n == 128 else 128, block_n, block_k, num_warps=4, num_stages=2 + (problem.taps > 1)
        )
    stages = 2 if problem.taps * reduced <= 128 else 3
    if problem.is_pointwise and block_n == 128:  # three programs even where the epilogue adds a residual
        return GemmConfig(64, block_n, block_k, num_warps=4, num_stages=stages)
    return GemmConfig(128, block_n, block_k, num_warps=8 if block_n >= 128 else 4, num_stages=stages)


def _stem_config(problem: ConvProblem, kind: str, target: Target) -> GemmConfig:
    """Of stem_conv: a step is one long filter row or two short ones; the weight gradient takes all rows, if it can, to
    read dy once, and as many parts as there are processors: a program fills one."""
    block_co = _tile(problem.Co)
    if kind == "fprop":
        return GemmConfig(128, block_co, 32, num_warps=8 if block_co == 128 else 4, num_stages=4)
    block_n = _power(problem.R * problem.run, 256)
    block_k = 32 if problem.dtype == "float32" else 64
    tiles = -(-problem.Co // block_co) * -(-problem.R * problem.run // block_n)
    split = max(1, min(target.sm_count // tiles, problem.M // (4 * block_k)))
    return GemmConfig(block_co, block_n, block_k, num_warps=8, num_stages=3, split=split)


def _tile(columns: int) -> int:
    return 128 if columns > 64 else 64 if columns > 32 else 32


def _interpreter_config(problem: ConvProblem, kind: str) -> GemmConfig:
    # The interpreter's cost is per program and per loop step: the largest tile that is not mostly padding.
    depth = problem.R * problem.run if problem.is_stem and kind != "dgrad" else problem.Ci
    rows, columns = (problem.Co, depth) if kind == "wgrad" else (problem.M, problem.Co if kind == "fprop" else depth)
    reduced = problem.M if kind == "wgrad" else depth if kind == "fprop" else problem.Co
    return GemmConfig(_power(rows, 4096), _power(columns, 256), _power(reduced, 4096 if kind == "wgrad" else 256))


def _power(size: int, most: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))
