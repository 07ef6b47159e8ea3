"""Which configurations are worth measuring for a pass of a convolution, the likeliest first.

The lists come from compiling every tile for sm_90 and reading registers, spills and shared memory, and were pruned of
what never came within a twentieth of the fastest on an H100. Most entries let two or three programs share a processor,
so that one's loads overlap another's products and epilogue. A main loop spills next to nothing in any of them; a
``maxnreg`` that makes the epilogue spill a few dozen registers may still pay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .config import GemmConfig, supports
from .defaults import MODELLED, default_config
from .estimate import estimate_us
from .gram import gram_config, gram_tiles, has_pivot, is_centred
from .gram_dgrad import gram_dgrad_config
from .gram_wgrad import gram_wgrad_config
from .problem import ConvProblem
from .split import ELEMENT_BYTES, wgrad_split
from .target import Target

MOST = 24


class Tile(NamedTuple):
    """A GemmConfig but for what the problem decides."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    transposed: bool = False
    maxnreg: int | None = None
    prefetch: bool = False


T = True
# fprop of one or two steps of the reduction: nothing to pipeline, so memory goes to further programs.
FPROP_SHORT = (
    Tile(128, 128, 64, 8, 2, T, 128), Tile(128, 64, 64, 4, 2, T), Tile(128, 64, 64, 4, 2), Tile(128, 128, 64, 8, 2, T),
    Tile(64, 64, 64, 4, 2, T), Tile(128, 128, 64, 4, 2), Tile(256, 64, 64, 8, 2, T), Tile(64, 64, 64, 4, 2),
    Tile(64, 128, 64, 4, 2),
)  # fmt: skip
FPROP = (
    Tile(128, 128, 64, 8, 3, T, 128), Tile(128, 256, 64, 8, 3, T), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 3, T), Tile(128, 64, 64, 4, 3, T), Tile(128, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3),
    Tile(128, 128, 64, 8, 4, T), Tile(256, 64, 64, 8, 4, T), Tile(128, 128, 32, 8, 6, T, 128),
    Tile(128, 256, 32, 8, 6, T), Tile(64, 128, 32, 4, 6), Tile(128, 32, 64, 4, 3),
)  # fmt: skip
# dgrad of a 1x1: two operands are read for the left one, which halves the stages that fit.
DGRAD_POINTWISE = (
    Tile(64, 256, 32, 4, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 2, maxnreg=128),
    Tile(64, 128, 64, 4, 2), Tile(128, 64, 64, 4, 3, T), Tile(128, 64, 64, 8, 3), Tile(128, 64, 64, 4, 2),
    Tile(64, 256, 32, 4, 3, prefetch=True), Tile(64, 128, 64, 4, 2, prefetch=True), Tile(64, 256, 32, 4, 4),
    Tile(64, 64, 64, 4, 3, prefetch=True), Tile(128, 64, 64, 4, 2, prefetch=True), Tile(64, 128, 32, 4, 4),
    Tile(64, 64, 64, 4, 4, T), Tile(128, 64, 64, 8, 3, T), Tile(128, 32, 64, 4, 3),
)  # fmt: skip
DGRAD_FORMED = (
    Tile(128, 128, 64, 8, 3, maxnreg=128), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3),
    Tile(128, 256, 64, 8, 3, prefetch=True), Tile(64, 128, 64, 4, 3, prefetch=True), Tile(64, 256, 32, 4, 4),
    Tile(128, 128, 64, 8, 3, maxnreg=128, prefetch=True), Tile(64, 256, 32, 4, 4, prefetch=True),
    Tile(128, 256, 64, 8, 4), Tile(128, 64, 64, 4, 3, prefetch=True), Tile(128, 128, 64, 8, 3, T, 128),
    Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 5, maxnreg=128), Tile(256, 128, 64, 8, 3),
    Tile(128, 32, 64, 4, 3),
)  # fmt: skip
DGRAD = (
    Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3, T, 128), Tile(128, 64, 64, 4, 3, T), Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3, maxnreg=128), Tile(128, 64, 64, 4, 3),
    Tile(128, 128, 64, 4, 3, prefetch=True), Tile(128, 64, 64, 4, 3, T, prefetch=True),
    Tile(64, 128, 64, 4, 3, prefetch=True), Tile(128, 256, 64, 8, 3, prefetch=True), Tile(128, 128, 32, 4, 6),
    Tile(128, 128, 64, 8, 3, T, 128, True), Tile(128, 64, 64, 4, 3, prefetch=True), Tile(128, 256, 32, 8, 6),
    Tile(128, 64, 64, 4, 3, maxnreg=128), Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 4, T),
    Tile(128, 64, 32, 4, 6, T), Tile(128, 32, 64, 4, 3),
)  # fmt: skip

# Output channels, input channels, rows, warps, stages, taps of a program.
WGRAD = (
    (128, 128, 64, 8, 3, 1), (64, 64, 64, 4, 4, 1), (128, 256, 64, 8, 3, 1), (128, 128, 64, 4, 3, 1),
    (128, 64, 64, 4, 4, 1), (64, 128, 64, 4, 4, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1),
    (64, 64, 128, 4, 3, 1), (128, 64, 128, 8, 2, 1), (128, 128, 32, 8, 6, 1), (128, 256, 32, 8, 5, 1),
)  # fmt: skip
WGRAD_ROW = (
    (128, 64, 64, 8, 3, 3), (64, 64, 64, 4, 3, 3), (128, 64, 64, 8, 4, 3), (128, 256, 64, 8, 3, 1),
    (128, 128, 64, 8, 3, 1), (64, 64, 32, 4, 4, 3), (64, 64, 64, 4, 4, 3),
)  # fmt: skip

# fprop with a projection as its second product: two accumulators live at once in the second loop.
FPROP_PROJECTION = (
    Tile(64, 128, 64, 4, 2), Tile(64, 128, 64, 4, 3), Tile(128, 64, 64, 8, 3, T), Tile(64, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 2), Tile(64, 64, 64, 4, 3, maxnreg=128), Tile(64, 64, 64, 4, 3, T), Tile(64, 128, 64, 4, 3, T),
    Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 2, T), Tile(64, 256, 64, 8, 2),
    Tile(64, 128, 32, 4, 4), Tile(128, 64, 64, 4, 3, T),
)  # fmt: skip

# A 3x3 of stride 1 in boxes, sm_90: one operand's channels wide, the widest first that leaves two programs.
BOX = (
    Tile(128, 128, 64, 8, 3, T), Tile(128, 256, 64, 8, 3, T), Tile(64, 128, 64, 4, 3, T), Tile(128, 64, 64, 4, 3, T),
    Tile(128, 128, 64, 8, 3, T, 128), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4), Tile(64, 256, 64, 8, 3, T),
    Tile(256, 64, 64, 8, 3), Tile(128, 128, 64, 4, 3, T),
)  # fmt: skip
# Rows, channels, warps, stages, programs a processor.
WALK = ((64, 64, 4, 2, 2), (128, 64, 8, 2, 1), (64, 32, 4, 2, 3))
# Output channels, input channels, rows, warps, stages, taps, programs a processor.
BOX_WGRAD = (
    (64, 64, 64, 8, 3, 9, 1), (64, 32, 64, 4, 3, 9, 2), (128, 64, 64, 8, 3, 3, 1), (64, 64, 64, 4, 3, 3, 2),
    (128, 128, 64, 8, 3, 3, 1), (128, 128, 64, 8, 3, 1, 2), (64, 64, 64, 8, 4, 9, 1), (128, 64, 64, 8, 3, 3, 2),
)  # fmt: skip
MOST_ROWS = 8
"""Of a problem that boxes take: how many configurations of pointers are measured beside them."""

GRAM_DGRAD = (
    Tile(128, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3, maxnreg=128), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 3),
    Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(128, 128, 32, 8, 6, maxnreg=128), Tile(128, 64, 32, 4, 6),
    Tile(256, 128, 64, 8, 4), Tile(256, 64, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4),
)  # fmt: skip
# gram_wgrad: output channels, input channels, rows, warps, stages. dout is read once for every tile of input channels.
GRAM_WGRAD = (
    (128, 128, 64, 8, 3), (64, 256, 64, 8, 2), (64, 256, 32, 4, 3), (128, 256, 32, 8, 3), (256, 128, 32, 8, 3),
    (128, 128, 32, 8, 4), (128, 128, 32, 4, 3), (64, 128, 64, 4, 3), (64, 128, 32, 4, 4), (256, 64, 32, 8, 3),
    (128, 64, 64, 8, 3), (128, 64, 32, 4, 4), (64, 64, 64, 4, 3),
)  # fmt: skip
# gram: the side of a square tile, rows, warps, stages.
GRAM = (
    (128, 32, 8, 6), (128, 64, 8, 4), (128, 64, 8, 3), (128, 32, 8, 4), (128, 32, 8, 3), (64, 64, 4, 4),
    (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3), (64, 32, 4, 5), (64, 128, 4, 2),
)  # fmt: skip
# The same of wide data, whose accumulators have 64 bits.
GRAM_WIDE = ((64, 16, 8, 6), (64, 16, 8, 4), (64, 32, 8, 3), (32, 32, 4, 4), (32, 16, 4, 6))


def gram_candidates(problem: ConvProblem, kind: str, target: Target, most: int = MOST) -> list[GemmConfig]:
    """The Gram route's "gram", "wgrad" (that forms dz) or "dgrad" for a convolution, the planner's default first."""
    itemsize = ELEMENT_BYTES.get(problem.dtype, 2)
    if kind == "gram":
        default = gram_config(
            problem.M,
            problem.Ci,
            target.sm_count,
            itemsize=itemsize,
            group_products=target.has_group_products,
            pivots=has_pivot(problem.dtype),
            interpreter=target.interpreter,
        )
        proposed = _gram(problem, target)
    elif kind == "wgrad":
        default, proposed = gram_wgrad_config(problem, target), _gram_wgrad(problem, target)
    else:
        default = gram_dgrad_config(problem.M, problem.Ci, problem.Co, target, itemsize=itemsize)
        proposed = (
            GemmConfig(m, n, k, warps, stages, 1, maxnreg)
            for m, n, k, warps, stages, _, maxnreg, _ in GRAM_DGRAD
            if n <= max(problem.Ci, 64)
        )
    found = dict.fromkeys([default, *proposed])
    return [config for config in found if supports(problem, kind, target, config, formed=True)[0]][:most]


def projection_candidates(problem: ConvProblem, target: Target, most: int = MOST) -> list[GemmConfig]:
    """Of the Gram route's fprop of ``problem`` which a projection joins, the planner's default first."""
    tiles = (
        GemmConfig(m, n, k, warps, stages, 1, maxnreg, transposed)
        for m, n, k, warps, stages, transposed, maxnreg, _ in FPROP_PROJECTION
        if n <= max(problem.Co, 32)
    )
    found = dict.fromkeys([default_config(problem, "fprop", target, epilogue="projection"), *tiles])
    return [config for config in found if supports(problem, "fprop", target, config)[0]][:most]


def _gram(problem: ConvProblem, target: Target) -> Iterator[GemmConfig]:
    """As many parts as there are processors, or two or three times as many."""
    for n, k, warps, stages in GRAM_WIDE if is_centred(problem.dtype) else GRAM:
        if n <= max(64, problem.Ci):
            programs = target.sm_count // gram_tiles(problem.Ci, n)
            for parts in (1, 2) if n > 64 else (2, 3):
                if 1 <= programs * parts <= problem.M // k:
                    yield GemmConfig(n, n, k, warps, stages, programs * parts)


def _gram_wgrad(problem: ConvProblem, target: Target) -> Iterator[GemmConfig]:
    for i, (co, ci, k, warps, stages) in enumerate(GRAM_WGRAD):
        if co <= max(64, problem.Co) and ci <= max(64, problem.Ci):
            split = wgrad_split(problem, co, ci, k, target.sm_count)
            yield GemmConfig(co, ci, k, warps, stages, split)
            if i < 4:
                yield GemmConfig(co, ci, k, warps, stages, max(1, split // 2))


LIKELY = 1.4
"""Of the shortest estimate: what should take longer is not measured. On the recorded passes this left out a sixth, and
lost a fortieth of one pass's time; the eight likeliest alone lost as little."""


def candidates(
    problem: ConvProblem, kind: str, target: Target, *, formed: bool = False, epilogue: str = "", most: int = MOST
) -> list[GemmConfig]:
    """At most ``most`` distinct configurations of ``kind`` that ``target`` supports, the planner's default first.

    The others follow as the cost model has them, likeliest first. ``formed``: of a gradient whose dy lies formed.
    ``epilogue``: that of an fprop, as :func:`choices` has it.
    """
    default = default_config(problem, kind, target, epilogue=epilogue)
    stem = problem.is_stem and kind != "dgrad"
    if stem:
        proposed = _stem(problem, kind, default)
    else:
        proposed = _wgrad(problem, target, formed) if kind == "wgrad" else _gemm(problem, kind, formed)
    found = dict.fromkeys([default, *proposed])
    fitting = [config for config in found if supports(problem, kind, target, config, formed=formed)[0]]
    if target.sm == MODELLED and not stem:
        fitting = _likely(problem, kind, target, formed, fitting)
    boxes = [config for config in _boxes(problem, kind, target) if supports(problem, kind, target, config)[0]]
    return [*fitting[: min(MOST_ROWS, most // 2) if boxes else most], *boxes][:most]


def _likely(problem: ConvProblem, kind: str, target: Target, formed: bool, found: list[GemmConfig]) -> list[GemmConfig]:
    us = {config: estimate_us(problem, kind, target, config, formed=formed) for config in found}
    shortest = min(us.values(), default=0.0)
    likely = sorted((config for config in found[1:] if us[config] <= LIKELY * shortest), key=lambda c: us[c])
    return [*found[:1], *likely]


def _boxes(problem: ConvProblem, kind: str, target: Target) -> Iterator[GemmConfig]:
    """The forms of a 3x3 of stride 1 that tensor descriptors read."""
    if not target.has_group_products or not problem.is_same_3x3 or problem.dtype == "float32":
        return
    if kind == "wgrad":
        for co, ci, k, warps, stages, taps, programs in BOX_WGRAD:
            if co <= max(64, problem.Co) and ci <= max(64, problem.Ci):
                tiles = -(-problem.Co // co) * -(-problem.Ci // ci) * (9 // taps)
                split = max(1, programs * target.sm_count // tiles)
                cap = 128 if programs * warps > 8 else None
                yield GemmConfig(co, ci, k, warps, stages, split, cap, row_taps=taps, form="box")
        return
    columns, depth = (problem.Co, problem.Ci) if kind == "fprop" else (problem.Ci, problem.Co)
    for m, n, warps, stages, programs in WALK if depth <= 64 else ():
        split = max(1, programs * target.sm_count // -(-columns // n))
        yield GemmConfig(m, n, depth, warps, stages, split, form="walk")
    for m, n, k, warps, stages, transposed, maxnreg, _ in BOX:
        if n <= max(columns, 64):
            yield GemmConfig(m, n, min(k, depth), warps, stages, 1, maxnreg, transposed, form="box")


def _gemm(problem: ConvProblem, kind: str, formed: bool) -> Iterator[GemmConfig]:
    """fprop and dgrad: rows by output channels, reduced over input channels and taps (dgrad: the other way)."""
    columns, depth = (problem.Co, problem.Ci) if kind == "fprop" else (problem.Ci, problem.Co)
    tiles: tuple[Tile, ...]
    if kind == "dgrad":
        tiles = DGRAD_FORMED if formed else DGRAD_POINTWISE if problem.is_pointwise else DGRAD
    else:
        tiles = FPROP_SHORT if problem.taps * depth <= 128 else FPROP
    for m, n, k, warps, stages, transposed, maxnreg, prefetch in tiles:
        if n <= max(columns, 32):
            k = min(k, 64 if depth > 32 else 32)
            yield GemmConfig(m, n, k, warps, stages, 1, maxnreg, transposed, prefetch=prefetch)


def _wgrad(problem: ConvProblem, target: Target, formed: bool) -> Iterator[GemmConfig]:
    """Output by input channels of one tap or three, reduced over the rows, which are split into parts."""
    tiles: tuple[tuple[int, ...], ...]
    if problem.S == 3:
        tiles = WGRAD_ROW
    elif formed:
        tiles = WGRAD
    else:  # two prologues beside as many accumulators would spill in the main loop
        tiles = tuple(tile for tile in WGRAD if tile[:4] not in ((256, 128, 64, 8), (128, 128, 64, 4)))
    tried = 0
    for co, ci, k, warps, stages, row_taps in tiles:
        if co <= max(64, problem.Co) and ci <= max(64, problem.Ci):
            split = wgrad_split(problem, co, ci, k, target.sm_count, row_taps)
            config = GemmConfig(co, ci, k, warps, stages, split, row_taps=row_taps)
            yield config
            tried += 1
            if tried <= 2:
                yield from (replace(config, split=other) for other in (2 * split, split // 2) if other >= 1)


def _stem(problem: ConvProblem, kind: str, default: GemmConfig) -> Iterator[GemmConfig]:
    """stem_conv: steps of whole filter rows; backward, columns that hold all runs (dy is read once) or half of them."""
    if kind == "fprop":
        for m, rows, warps, stages in ((128, 2, 4, 4), (128, 1, 4, 5), (256, 2, 8, 3), (64, 2, 4, 4), (128, 4, 8, 2),
                                       (128, 4, 4, 2), (256, 1, 8, 4), (64, 4, 4, 3), (128, 2, 8, 3)):  # fmt: skip
            yield replace(default, block_m=m, block_k=rows * problem.run, num_warps=warps, num_stages=stages)
        return
    for n, k, warps, stages, parts in (
        (256, 64, 8, 4, 1), (256, 32, 8, 4, 2), (128, 64, 4, 3, 1), (256, 64, 4, 3, 1), (256, 64, 8, 3, 2),
        (128, 64, 4, 4, 2), (256, 128, 8, 2, 1), (128, 32, 4, 4, 1), (64, 64, 4, 4, 1),
    ):  # fmt: skip
        yield replace(default, block_n=n, block_k=k, num_warps=warps, num_stages=stages, split=parts * default.split)
