"""What the Gram route's kernels take besides, as the planner gives it to each dtype: a pivot, means, scales.

float16 and wide data have a pivot, float16 also powers of two that its matrices come multiplied by, and wide data means
that the gradients subtract in the bias's place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fused_resnet.launch import vendor
from fused_resnet.launch.gram_dgrad import gram_dgrad
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.gram import is_centred
from fused_resnet.plan.problem import ConvProblem

from . import tensors

Tensors = dict[str, Any]
FAR = 20.0


def pivot_of_norm(x: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Mean and rstd of ``x``, as its BatchNorm gives them; every second channel is moved far from zero."""
    x[:, ::2] += FAR
    pivot = torch.ones_like(affine)
    pivot[0] = 0.0
    pivot[0, ::2] = FAR
    return pivot


def taken_off(pivot: torch.Tensor, affine: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The row that the Gram kernel takes off every other; of 16-bit data where the difference is exact alone."""
    if affine is None:
        near = (pivot / pivot[0]).float()
        exact = ((near >= 0.5) & (near <= 2.0)).all(0)
        row = pivot[0]
    else:
        row = torch.relu(pivot[0] * affine[0] + affine[1])
        exact = row * pivot[1] > 8 * affine[0].abs()
    return (torch.where(exact, row, 0.0) if dtype.itemsize == 2 else row).to(dtype)


def of_gradients(p: ConvProblem, kind: str, w: torch.Tensor, acc: torch.dtype) -> Tensors:
    """The inputs of "wgrad" or "dgrad" beside the tensors: matrices, and the bias or the means in its place."""
    t: Tensors = {}
    device = str(w.device)
    if is_centred(p.dtype):
        t["mean"] = tensors.channels(1, p.Ci, device, acc)[0]
    if kind == "dgrad":
        t["products"] = tensors.products(p.Ci, getattr(torch, p.dtype), device)
        t["aw"] = w.flatten(1)
        if not is_centred(p.dtype):  # a second term that does not count, as for ordinary data
            t["aw"] = torch.stack([t["aw"], torch.zeros_like(t["aw"])])
            t["aw terms"] = torch.ones(1, dtype=torch.int32, device=device)
        if is_centred(p.dtype):
            t["sum dz"] = tensors.channels(1, p.Co, device, acc)[0]
        else:
            t["bias"] = tensors.channels(1, p.Ci, device, acc)[0] * 0.01
        if p.dtype == "float16":
            t["scales"] = torch.ones(2, dtype=acc, device=device)
    return t


def dgrad(t: Tensors, y: torch.Tensor, stats: torch.Tensor | None, config: GemmConfig, **more: Any) -> Any:
    """``gram_dgrad`` of what ``t`` has."""
    matrices = t["aw"], t["products"], t.get("bias")
    means = (t["sum dz"], t["mean"]) if "mean" in t else None
    return gram_dgrad(
        t["dy"], y, *matrices, stats, config, aw_terms=t.get("aw terms"), scales=t.get("scales"), means=means, **more
    )


def centred(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return x - t["mean"].to(x.dtype)[None, :, None, None] if "mean" in t else x


def centred_gradient(dy: torch.Tensor, t: Tensors, rows: int) -> torch.Tensor:
    return dy - (t["sum dz"] / rows).to(dy.dtype)[None, :, None, None] if "sum dz" in t else dy


def with_products(dx: torch.Tensor, a: torch.Tensor, p: ConvProblem, t: Tensors) -> torch.Tensor:
    """dx + a P + bias."""
    acc = torch.promote_types(dx.dtype, torch.float32)
    whole = tensors.whole(t["products"]).t()[:, :, None, None].to(dx.dtype)
    more = vendor.conv_fprop(centred(a, t), whole, replace(p, Co=p.Ci)).to(acc)
    if "bias" in t:
        more = more + t["bias"].to(acc)[None, :, None, None]
    return (dx.to(acc) + more).to(dx.dtype)
