"""Per-tile reductions over rows, and what has to be known to merge them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class StatTiles(NamedTuple):
    """Statistics of consecutive groups of rows (pixels), per channel.

    ``data`` is [2, T, C]: mean and M2 (sum of squared deviations from that mean) of each group, in float32, or float64
    for float64 data. Group ``t`` holds ``rows_per_tile`` rows, the last one what is left of ``rows``.
    """

    data: torch.Tensor
    rows_per_tile: int
    rows: int
