"""Boxes of pixels: how the rows of a 3x3 convolution's GEMM are cut where tensor descriptors read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .problem import ConvProblem

LARGEST = 256
"""Elements of one dimension that one copy takes."""
COPY_BYTES = 128
"""Of a pixel's channels, so many are copied at once: as many as a pattern of shared memory holds."""


class Box(NamedTuple):
    """``n`` images by ``h`` by ``w`` pixels, each a power of two."""

    n: int
    h: int
    w: int

    def tiles(self, problem: ConvProblem) -> bool:
        """Whether boxes like this one cover the batch without a remainder."""
        return problem.N % self.n == problem.H % self.h == problem.W % self.w == 0

    def count(self, problem: ConvProblem) -> int:
        """How many boxes cover the batch."""
        return -(-problem.N // self.n) * -(-problem.H // self.h) * -(-problem.W // self.w)

    @property
    def touched(self) -> int:
        """Pixels that the nine taps of the box read."""
        return self.n * (self.h + 2) * (self.w + 2)


def _boxes(pixels: int) -> Iterator[Box]:
    powers = [1 << i for i in range(min(pixels, LARGEST).bit_length())]
    for h in powers:
        for w in powers:
            if h * w <= pixels <= h * w * LARGEST:
                yield Box(pixels // (h * w), h, w)


def exact_box(problem: ConvProblem, pixels: int) -> Box | None:
    """The box of ``pixels`` that tiles the batch and whose taps touch the fewest others, if there is one."""
    return min((b for b in _boxes(pixels) if b.tiles(problem)), key=lambda b: b.touched, default=None)


def row_box(problem: ConvProblem, pixels: int) -> Box | None:
    """The same of boxes one row high: those that walk down the images."""
    return min((b for b in _boxes(pixels) if b.h == 1 and b.tiles(problem)), key=lambda b: b.touched, default=None)


def any_box(problem: ConvProblem, pixels: int) -> Box:
    """The box of ``pixels`` that covers the batch with the least remainder; between equals, the fewest touched."""
    return min(_boxes(pixels), key=lambda b: (b.count(problem), b.touched))


def why_not_boxes(problem: ConvProblem, pixels: int, reduced: int, step: int, *, walks: bool) -> str:
    """Why fprop or dgrad of ``problem`` over ``reduced`` channels does not run in boxes of ``pixels``, or ""."""
    if not problem.is_same_3x3:
        return f"boxes take a 3x3 filter of stride 1 and padding 1, not {problem}"
    if (row_box if walks else exact_box)(problem, pixels) is None:
        return f"no box of {pixels} pixels tiles {problem}"
    if reduced % step or step & (step - 1) or (walks and reduced != step):
        return f"{reduced} channels, in steps of {step}"
    return ""


def why_not_stored(channels: int, width: int, itemsize: int) -> str:
    """Why tiles ``width`` wide do not store ``channels``, or "": a copy out that lies wholly outside traps."""
    beyond = -channels % width
    if beyond * itemsize >= COPY_BYTES:
        return f"of the last {width} channels {beyond} are none of {channels}, whole copies of {COPY_BYTES} bytes"
    return ""
