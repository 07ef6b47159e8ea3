"""Frozen kernel configurations, and the single question whether one of them fits a problem on a target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a GEMM kernel. For wgrad, ``block_m`` tiles Co, ``block_n`` tiles Ci, ``block_k`` tiles the reduced rows."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    split: int = 1
    """wgrad only: into how many parts the reduced rows are split."""
    maxnreg: int | None = None

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
