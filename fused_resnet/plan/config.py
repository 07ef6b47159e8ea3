"""Frozen kernel configurations, and the single question whether one of them fits a problem on a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .box import why_not_boxes, why_not_stored
from .problem import ConvProblem
from .target import Target

FORMS = ("rows", "box", "walk")


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a GEMM kernel. For wgrad, ``block_m`` tiles Co, ``block_n`` Ci, ``block_k`` the reduced rows; for both
    gradients in one kernel ``block_m`` the rows, ``block_n`` Ci, and ``block_k`` holds Co."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    split: int = 1
    """wgrad, alone or paired: into how many parts the reduced rows are split."""
    maxnreg: int | None = None
    transposed: bool = False
    """fprop and dgrad only: accumulate the transposed result. The pixels are the tensor cores' right operand then."""
    row_taps: int = 1
    """wgrad only: how many taps one program sums: 1, 3 of a filter three wide, or in boxes all 9 of a 3x3."""
    prefetch: bool = False
    """dgrad only: what the epilogue reads is on its way during the main loop, at the price of its registers."""
    form: str = "rows"
    """How pixels are addressed: "rows", a pointer to each; for a 3x3 of stride 1 also "box", by tensor descriptors, and
    "walk", the same down whole columns of the images, which ``split`` programs share."""

    @cached_property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the kernel's own arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GemmConfig:
        """What :meth:`to_dict` wrote. ValueError or TypeError where it is no configuration that a kernel could have."""
        config = cls(**raw)
        powers = (config.block_m, config.block_n, config.block_k, config.num_warps)
        counts = (*powers, config.num_stages, config.split, config.row_taps, config.maxnreg or 1)
        flags = (config.transposed, config.prefetch)
        if not all(type(count) is int and count > 0 for count in counts) or any(size & (size - 1) for size in powers):
            raise ValueError(f"no tile has these sizes: {dict(raw)}")
        if not all(type(flag) is bool for flag in flags) or config.form not in FORMS:
            raise ValueError(f"no tile is of this form: {dict(raw)}")
        return config


@dataclass(frozen=True)
class PassConfig:
    """Tile of a memory-bound pass: ``block_m`` rows (pixels) by ``block_c`` channels."""

    block_m: int
    block_c: int
    num_warps: int = 4

    @cached_property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the kernel's own arguments."""
        return {"num_warps": self.num_warps}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SingleConfig(GemmConfig):
    """Tile of a whole bottleneck: ``tile_p`` x ``tile_q`` pixels of its output in ``block_m`` rows.

    The first convolution runs on ``block_halo`` pixels at a time, the last on ``block_n`` channels; ``block_k`` of the
    input's channels make one step.
    """

    block_halo: int = 64
    tile_p: int = 8
    tile_q: int = 8
    programs: int = 264
    """How many there are at most, each with a scratch of its own."""


MOST_TAPS = 63
"""The taps of a filter whose validity fits the bits of one integer per row."""


def supports(
    problem: ConvProblem, kind: str, target: Target, config: GemmConfig, *, formed: bool = False
) -> tuple[bool, str]:
    """Whether our ``kind`` of ``problem`` runs on ``target`` with ``config``; else why. "fprop", "dgrad", "wgrad", or
    "pair": both gradients of a 1x1 in one kernel.

    ``formed``: dy need not be formed on load.
    """
    if problem.groups != 1:
        return False, f"a grouped convolution ({problem.groups} groups)"
    stem = problem.is_stem and kind != "dgrad"
    if problem.taps > MOST_TAPS and kind != "wgrad" and not stem:
        return False, f"a filter of {problem.R}x{problem.S} taps; the kernels take up to {MOST_TAPS}"
    if problem.Ci < 16 and problem.taps > 1 and not stem and not target.interpreter:
        return False, f"{problem.Ci} input channels would leave most of a 16-wide tensor instruction empty"
    if problem.dtype == "float64" and not target.interpreter:
        return False, "float64 runs in the interpreter only"
    if min(config.block_m, config.block_n, config.block_k) < 16:
        return False, f"a tile narrower than 16: {config}"
    if kind == "pair":
        return _supports_pair(problem, target, config)
    if config.form != "rows":
        return _supports_boxes(problem, kind, target, config)
    if config.row_taps not in (1, 3) or (config.row_taps == 3 and problem.S != 3):
        return False, f"{config.row_taps} taps in a program, of a filter {problem.S} wide"
    if stem and kind == "fprop" and config.block_k % problem.run:
        return False, f"a step takes whole rows of the filter, {problem.run} elements each: {config}"
    itemsize = 4 if problem.dtype == "float32" else 2
    staged = config.block_m + config.block_n
    if kind == "dgrad" and problem.is_pointwise and not formed:
        staged += config.block_m  # y, beside dz
    operands = itemsize * config.num_stages * config.block_k * staged
    if not target.interpreter and operands > target.shared_memory:
        return False, f"{operands} bytes of shared memory, of {target.shared_memory}"
    return True, "supported"


def _supports_pair(problem: ConvProblem, target: Target, config: GemmConfig) -> tuple[bool, str]:
    if not problem.is_gemm:
        return False, "both gradients in one kernel are those of an unstrided 1x1"
    if problem.Co > config.block_k:
        return False, f"a step takes all {problem.Co} output channels: {config}"
    if problem.dtype == "float32" and not target.interpreter:
        return False, "of 32 bits the operands of two products leave no registers"
    rows = config.num_stages * config.block_m
    operands = 2 * (2 * rows * (config.block_k + config.block_n) + config.block_k * config.block_n)
    if not target.interpreter and operands > target.shared_memory:
        return False, f"{operands} bytes of shared memory, of {target.shared_memory}"
    return True, "supported"


def _supports_boxes(problem: ConvProblem, kind: str, target: Target, config: GemmConfig) -> tuple[bool, str]:
    """The same of the forms that read boxes of pixels."""
    itemsize = {"float64": 8, "float32": 4}.get(problem.dtype, 2)
    if target.sm < 90 and not target.interpreter:
        return False, "tensor descriptors are copied by hardware from sm_90 on"
    if not problem.is_same_3x3:
        return False, "boxes take a 3x3 filter of stride 1 and padding 1"
    if problem.Ci * itemsize % 16 or problem.Co * itemsize % 16:
        return False, "a tensor descriptor wants pixels of a multiple of 16 bytes"
    if kind == "wgrad":
        if config.form != "box" or config.row_taps not in (1, 3, 9):
            return False, f"a weight gradient takes 1, 3 or 9 taps in boxes: {config}"
        grads, inputs = {1: (1, 1), 3: (1, 3), 9: (3, 3)}[config.row_taps]
        staged = config.block_k * config.num_stages * (grads * config.block_m + inputs * config.block_n)
    else:
        reduced, columns = (problem.Ci, problem.Co) if kind == "fprop" else (problem.Co, problem.Ci)
        walks = config.form == "walk"
        reason = why_not_boxes(problem, config.block_m, reduced, config.block_k, walks=walks)
        reason = reason or why_not_stored(columns, config.block_n, itemsize)
        if reason:
            return False, reason
        if walks and config.transposed:
            return False, "a walk accumulates pixels by channels"
        staged = config.block_k * config.num_stages * (config.block_m + config.block_n)
        if walks:  # the nine filters stay; three boxes a step, and the result on its way out
            staged = config.block_k * (9 * config.block_n + 3 * config.num_stages * config.block_m)
            staged += 2 * config.block_m * config.block_n
    if not target.interpreter and itemsize * staged > target.shared_memory:
        return False, f"{itemsize * staged} bytes of shared memory, of {target.shared_memory}"
    return True, "supported"
