"""Tiles of the weight gradient that forms dz on load from the gradient above the ReLU."""

from __future__ import annotations

from dataclasses import replace

from .config import GemmConfig
from .passes import next_power_of_2
from .problem import ConvProblem
from .split import wgrad_split
from .target import Target


def gram_wgrad_config(problem: ConvProblem, target: Target) -> GemmConfig:
    """``block_m`` output by ``block_n`` input channels: the wider the latter, the fewer times dout is read."""
    width = min(max(next_power_of_2(problem.Ci), 16), 128)
    if target.interpreter:
        return GemmConfig(min(max(next_power_of_2(problem.Co), 16), 256), width, 1024)
    if problem.dtype == "float32":
        config = GemmConfig(64, min(width, 64), 32, num_warps=4, num_stages=3)
    elif width <= 64 and target.has_group_products:
        config = GemmConfig(256, 64, 32, num_warps=8, num_stages=3)
    else:
        config = GemmConfig(128, width, 64 if target.has_group_products else 32, num_warps=8, num_stages=3)
    split = wgrad_split(problem, config.block_m, config.block_n, config.block_k, target.sm_count)
    return replace(config, split=split)
