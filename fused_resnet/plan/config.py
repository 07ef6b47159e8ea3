"""Frozen kernel configurations, and the single question whether one of them fits a problem on a target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .problem import ConvProblem
from .target import Target


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a GEMM kernel. For wgrad, ``block_m`` tiles Co, ``block_n`` Ci, ``block_k`` the reduced rows."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    split: int = 1
    """wgrad only: into how many parts the reduced rows are split."""
    maxnreg: int | None = None
    transposed: bool = False
    """fprop and dgrad only: accumulate the transposed result. The pixels are the tensor cores' right operand then."""
    row_taps: int = 1
    """wgrad only: how many taps of a filter row one program sums, 1, or 3 of a filter three wide."""
    prefetch: bool = False
    """dgrad only: what the epilogue reads is on its way during the main loop, at the price of its registers."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PassConfig:
    """Tile of a memory-bound pass: ``block_m`` rows (pixels) by ``block_c`` channels."""

    block_m: int
    block_c: int
    num_warps: int = 4

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
    """Whether our ``kind`` ("fprop", "dgrad", "wgrad") of ``problem`` runs on ``target`` with ``config``; else why.

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
