"""Into how many parts a weight gradient splits its rows."""

from __future__ import annotations

from .problem import ConvProblem

MIN_STEPS = 4
"""K steps of the shortest part worth a program of its own."""
ELEMENT_BYTES = {"float64": 8, "float32": 4}


def wgrad_split(
    problem: ConvProblem, block_m: int, block_n: int, block_k: int, sm_count: int, row_taps: int = 1
) -> int:
    """The number of parts that fills up to two waves of ``sm_count`` programs best.

    The float32 partials are written and read once, so they stay below a quarter of the bytes of x and dy, unless that
    would leave processors idle in the first wave. ``row_taps``: taps of one program, as ``conv_wgrad`` takes them.
    """
    tiles = -(-problem.Co // block_m) * (problem.taps // row_taps) * -(-problem.Ci // block_n)
    steps = -(-problem.M // block_k)
    most = max(1, min(2 * sm_count // tiles, steps // MIN_STEPS))

    pixels = min(problem.N * problem.H * problem.W, problem.M * problem.taps)
    read = (pixels * problem.Ci + problem.M * problem.Co) * ELEMENT_BYTES.get(problem.dtype, 2)
    partial = 4 * problem.Co * problem.Ci * problem.taps
    affordable = max(read // (4 * partial), sm_count // tiles)

    def fill(split: int) -> float:
        waves = -(-tiles * split // sm_count)
        return tiles * split / (waves * sm_count)

    return max(range(1, max(1, min(most, affordable)) + 1), key=lambda split: (round(fill(split), 2), split))
