"""Launches a whole bottleneck whose statistics are frozen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.bottleneck_single import bottleneck_single_kernel
from ..plan.config import SingleConfig
from ..plan.passes import ceil_div, next_power_of_2
from ..plan.plans import ChainProblem
from ..plan.problem import ConvProblem
from ..plan.single import halo, why_not_shape
from .check import (
    DTYPES,
    accumulation_dtype,
    dot_precision,
    require_device,
    require_image,
    require_problem,
    require_shape,
    triton_dtype,
)
from .record import launch


class FrozenLayer(NamedTuple):
    """A convolution's ``weight`` [Co, Ci, R, S] and what its BatchNorm normalises with, [Co] each."""

    weight: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


def bottleneck_single(
    x: torch.Tensor,
    layers: tuple[FrozenLayer, FrozenLayer, FrozenLayer],
    problem: ChainProblem,
    config: SingleConfig,
    *,
    projection: FrozenLayer | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut) [N, Co, P, Q], in one launch.

    ``problem`` says which ReLU and shortcut there is: ``residual`` [N, Co, P, Q] is x itself or given, ``projection`` a
    1x1 of x. Images and weights are dense NHWC of one dtype, BatchNorm's vectors of any float dtype. Raises ValueError
    for other shapes, dtypes and layouts, and for blocks that the kernel does not take.
    """
    reason = why_not_shape(problem)
    if reason:
        raise ValueError(reason)
    if (problem.projection is None) != (projection is None) or (projection is not None and residual is not None):
        raise ValueError("a projection goes with a problem that has one, and without a residual")
    if config.tile_p * config.tile_q > config.block_m:
        raise ValueError(f"a tile of {config.tile_p} x {config.tile_q} pixels does not fit {config.block_m} rows")
    first, second, last = problem.convs
    require_image(x, (first.N, first.Ci, first.H, first.W), x, "x")
    pairs = [*zip(problem.convs, layers, strict=True)]
    pairs += [(problem.projection, projection)] if problem.projection and projection else []
    for conv, layer in pairs:
        _require_layer(layer, conv, x)
    if residual is not None:
        require_image(residual, (last.N, last.Co, last.P, last.Q), x, "residual")

    acc, c = accumulation_dtype(x.dtype), first.Co
    tiles_p, tiles_q = ceil_div(last.P, config.tile_p), ceil_div(last.Q, config.tile_q)
    tiles = last.N * tiles_p * tiles_q
    programs = min(tiles, config.programs)
    pixels, block_c = halo(config, second.stride), max(16, next_power_of_2(c))
    channels = sum(conv.Co for conv, _ in pairs)
    out = torch.empty(
        (last.N, last.Co, last.P, last.Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    scratch = torch.empty((programs, pixels, block_c), dtype=x.dtype, device=x.device)
    affine = torch.empty((programs, 2 * channels), dtype=acc, device=x.device)
    launch(
        bottleneck_single_kernel,
        (programs,),
        touched=(
            x,
            residual if residual is not x else None,
            out,
            scratch,
            affine,
            *(t for _, layer in pairs for t in layer if isinstance(t, torch.Tensor)),
        ),
        # The first convolution also runs on the halo.
        flops=sum(conv.flops for conv, _ in pairs[1:]) + 2 * tiles * pixels * first.Ci * c,
        config=config,
        device=x.device,
        x_ptr=x,
        out_ptr=out,
        residual_ptr=residual,
        scratch_ptr=scratch,
        affine_ptr=affine,
        first=layers[0],
        second=layers[1],
        third=layers[2],
        shortcut=projection,
        H=first.H,
        W=first.W,
        P=last.P,
        Q=last.Q,
        Ci=first.Ci,
        Co=last.Co,
        tiles=tiles,
        tiles_p=tiles_p,
        tiles_q=tiles_q,
        C=c,
        STRIDE_H=second.stride[0],
        STRIDE_W=second.stride[1],
        HAS_RESIDUAL=residual is not None,
        HAS_PROJECTION=projection is not None,
        APPLY_RELU=problem.relu,
        EVEN_K=first.Ci % config.block_k == 0,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
        TILE_P=config.tile_p,
        TILE_Q=config.tile_q,
        BLOCK_M=config.block_m,
        BLOCK_HALO=config.block_halo,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_C=block_c,
    )
    return out


def _require_layer(layer: FrozenLayer, conv: ConvProblem, x: torch.Tensor) -> None:
    require_problem(conv, x.dtype)
    require_image(layer.weight, (conv.Co, conv.Ci, conv.R, conv.S), x, "weight")
    for name in ("gamma", "beta", "mean", "var"):
        t = getattr(layer, name)
        if t is not None:
            require_device(x.device, **{name: t})
            require_shape(t, (conv.Co,), name)
            if t.dtype not in DTYPES.values() or not t.is_contiguous():
                raise ValueError(f"{name} must be contiguous and one of {', '.join(DTYPES)}, got {t.dtype}")
