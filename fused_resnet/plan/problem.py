"""Frozen descriptions of the work: what a kernel or a fused operation is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvProblem:
    """One 2-D convolution, in the names of the field.

    ``N H W Ci`` describe the input, ``Co R S`` the filter, ``P Q`` the output. ``dtype`` names the activations' dtype:
    "bfloat16", "float16", "float32" or "float64".
    """

    N: int
    H: int
    W: int
    Ci: int
    Co: int
    R: int = 1
    S: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    dtype: str = "bfloat16"

    @cached_property
    def P(self) -> int:
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1

    @cached_property
    def Q(self) -> int:
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1

    @cached_property
    def M(self) -> int:
        """Rows of the GEMM: output pixels."""
        return self.N * self.P * self.Q

    @cached_property
    def taps(self) -> int:
        return self.R * self.S

    @cached_property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution without padding, at any stride."""
        return self.taps == 1 and self.padding == (0, 0)

    @cached_property
    def is_gemm(self) -> bool:
        """A plain matrix product: 1x1, stride 1, no padding, one group."""
        return self.is_pointwise and self.stride == (1, 1) and self.groups == 1

    @cached_property
    def is_same_3x3(self) -> bool:
        """A 3x3 of stride 1 whose output has its input's size: every tap is the same picture, one pixel further."""
        ones = self.stride == self.padding == self.dilation == (1, 1)
        return ones and (self.R, self.S) == (3, 3) and self.groups == 1

    @cached_property
    def is_stem(self) -> bool:
        """A filter wider than 1x1 over images of up to four channels: forward and weight gradient are stem_conv's."""
        return self.Ci <= 4 and self.taps > 1 and self.S <= 8 and self.dilation[1] == 1 and self.groups == 1

    @cached_property
    def run(self) -> int:
        """Elements that stem_conv reads of a row of pixels for a row of the filter, at four channels."""
        return 16 if self.S <= 4 else 32

    @cached_property
    def flops(self) -> int:
        """Of one pass: forward, dgrad and wgrad each do this many."""
        return 2 * self.M * self.Co * (self.Ci // self.groups) * self.taps

    def sampled(self) -> ConvProblem:
        """A strided 1x1 conv without padding as the plain GEMM over the pixels that it samples."""
        if not self.is_pointwise:
            raise ValueError(f"only a 1x1 convolution without padding samples its input, not {self}")
        return replace(self, H=self.P, W=self.Q, stride=(1, 1))
