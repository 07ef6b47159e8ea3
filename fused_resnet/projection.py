"""How long a step should take on a target that is not there: a projection, from the rates of recorded kernels.

A launch takes ``start + memory * (its bytes at the target's bandwidth) + matrix * (its FLOPs at its matrix rate)``:
what a kernel does not hide adds up. The rates come from an H100's records (``python -m benchmarks.rates`` prints them
anew), and so does the uncertainty: on that GPU how far whole steps were off, on others how far single launches were, as
if all were off the same way. Kernels alone are counted: a step that waits for the host takes longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from .launch.record import Launch
from .plan.cost import Cost
from .plan.target import H100, Target

GEMM: Final = "any product"
PASS: Final = "any pass"
FLOPS_OF_A_GEMM: Final = 10**8
"""From here on a kernel without a record is taken as a product."""


class Rate(NamedTuple):
    """Microseconds before anything moves; factors over the target's sustained rates."""

    start: float
    memory: float
    matrix: float


class Projection(NamedTuple):
    """A projected figure: the middle, and between what bounds it is expected. Nothing of it was measured."""

    low: float
    middle: float
    high: float


RATES: Final[dict[str, Rate]] = {
    "any pass": Rate(4.38, 1.14, 1.45),
    "any product": Rate(22.8, 0.974, 0.841),
    "bn_act_grad_reduce_kernel": Rate(3.24, 1.06, 1.05),
    "bn_act_kernel": Rate(0, 1.01, 1.07),
    "bn_finalize_kernel": Rate(9.27, 3.14, 1.94),
    "bn_grad_apply_kernel": Rate(0, 1, 1.04),
    "bn_grad_finalize_kernel": Rate(7.41, 3.24, 1.94),
    "bn_stats_kernel": Rate(9.88, 1.46, 1.07),
    "conv_dgrad_kernel": Rate(4.9, 0.989, 1.35),
    "conv_fprop_kernel": Rate(3.67, 1.03, 1.31),
    "conv_wgrad_kernel": Rate(2.96, 0.85, 0.588),
    "conv_wgrad_reduce_kernel": Rate(2.45, 0.955, 1.21),
    "gram_backward_kernel": Rate(2.27, 1.07, 1.06),
    "gram_bias_kernel": Rate(2.97, 1.15, 1.08),
    "gram_dgrad_kernel": Rate(4.57, 0.936, 1.31),
    "gram_finalize_kernel": Rate(16.3, 2.68, 2.55),
    "gram_kernel": Rate(11.6, 1.15, 1.49),
    "gram_product_kernel": Rate(14.2, 1.72, 1.8),
    "gram_reduce_kernel": Rate(3.2, 1.1, 1.44),
    "gram_wgrad_kernel": Rate(5.33, 1.07, 1.5),
    "stem_conv_fprop_kernel": Rate(6.02, 1.75, 1.76),
    "stem_conv_wgrad_kernel": Rate(4.53, 1.25, 1.25),
    "stem_pad_kernel": Rate(1.69, 1.02, 1.04),
    "stem_pool_grad_apply_kernel": Rate(4.31, 1.2, 1.12),
    "stem_pool_grad_reduce_kernel": Rate(4.3, 1.18, 1.11),
    "stem_pool_kernel": Rate(6.13, 1.86, 1.5),
    "vendor_conv_dgrad": Rate(9.91, 0.929, 0.774),
    "vendor_conv_fprop": Rate(6.42, 0.777, 0.653),
    "vendor_conv_wgrad": Rate(11, 0.889, 0.652),
    "vendor_narrow_conv_fprop": Rate(26.1, 7.33, 7.42),
    "vendor_narrow_conv_wgrad": Rate(16.6, 4.78, 4.85),
    "native_batch_norm": Rate(0, 2.52, 0),
    "cudnn_batch_norm": Rate(0, 2.52, 0),
    "native_batch_norm_backward": Rate(0, 1.34, 0),
    "cudnn_batch_norm_backward": Rate(0, 1.34, 0),
    "max_pool2d_with_indices": Rate(0, 2.76, 0),
    "max_pool2d_with_indices_backward": Rate(0, 4.02, 0),
    "add": Rate(0, 0.958, 0),
    "add_": Rate(0, 0.958, 0),
    "relu": Rate(0, 0.97, 0),
    "relu_": Rate(0, 0.97, 0),
    "threshold_backward": Rate(0, 0.987, 0),
}

OFF: Final = 0.1
"""How far off a step may be on an H100: recorded ones were within 0.07, those of ResNet-18 without having been used."""
ELSEWHERE: Final = 0.35
"""On other GPUs: nine tenths of the recorded launches' time was within this, each by itself."""


def launch_us(launch: Launch, target: Target) -> float:
    """Microseconds of one launch of ours or of the vendor's."""
    return _us(launch.kernel, launch.flops, launch.bytes, 1, target)


def cost_us(cost: Cost, target: Target) -> float:
    """Microseconds of one of eager PyTorch's operators."""
    return _us(cost.name, cost.flops, cost.bytes, cost.launches, target)


def _us(name: str, flops: int, nbytes: int, launches: int, target: Target) -> float:
    rate = RATES.get(name) or RATES[GEMM if flops > FLOPS_OF_A_GEMM else PASS]
    return launches * rate.start + 1e6 * (
        rate.memory * nbytes / target.bandwidth + rate.matrix * flops / target.matrix_rate
    )


def projected(microseconds: Iterable[float], target: Target) -> Projection:
    """Their sum, with the uncertainty that projections for ``target`` have."""
    middle = sum(microseconds)
    apart = 1 + (OFF if H100.name in target.name.lower() else ELSEWHERE)
    return Projection(middle / apart, middle, middle * apart)
