"""Both gradients of a bottleneck's first convolution by one kernel: dgrad with its residual, and wgrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet.launch.conv_pair import conv_pair
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.conv_pair import MOST_OUTPUTS, pair_candidates
from fused_resnet.plan.target import Target

from . import errors, problems
from .cases import ConvCase, Tensors


@dataclass(frozen=True)
class PairCase(ConvCase):
    """``parts`` are what it stands for: their results are its own, and their times together what it is held against."""

    @property
    def parts(self) -> tuple[ConvCase, ConvCase]:
        p, role = self.problem, self.role
        return ConvCase(p, "dgrad", role, coeffs=True, residual=True), ConvCase(p, "wgrad", role, coeffs=True)

    def candidates(self, target: Target) -> list[GemmConfig]:
        return pair_candidates(self.problem, target)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def passes_bytes(self) -> int:
        return sum(part.passes_bytes() for part in self.parts)

    def ours(self, t: Tensors, config: GemmConfig) -> tuple[torch.Tensor, Any]:
        operands = t["x"], t["dy"], t["y"], t["coeffs"], t["w"]
        return conv_pair(*operands, self.problem, config, residual=t["residual"], out_dtype=self.dtype)

    def vendor(self, t: Tensors) -> torch.Tensor:
        dgrad, wgrad = self.parts
        dgrad.vendor(t)
        return wgrad.vendor(t)

    def _check_tiles(self, t: Tensors, out: torch.Tensor, tiles: Any) -> dict[str, dict[str, Any]]:
        return {"dw": errors.judge_part(tiles, self.parts[1].references(t))}


def pair_cases(layer: problems.Layer) -> list[PairCase]:
    """Of a layer that has both gradients by one kernel: a narrow first convolution."""
    p = layer.problem
    fits = layer.role == "conv1" and p.is_gemm and p.Co <= MOST_OUTPUTS
    return [PairCase(p, "pair", layer.role, coeffs=True, residual=True)] if fits else []
