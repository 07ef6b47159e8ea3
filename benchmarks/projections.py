"""The kernels of a projection on the Gram route: the product that it joins, its own gradients, its Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet.autograd.gram import pixels
from fused_resnet.launch import vendor
from fused_resnet.launch.conv_fprop import Projection, conv_fprop
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.gram import gram
from fused_resnet.plan.candidates import candidates, gram_candidates, projection_candidates
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.tables import pass_name
from fused_resnet.plan.target import Target

from . import centring, problems, tensors
from .cases import ConvCase, Tensors

NHWC = torch.channels_last


@dataclass(frozen=True)
class ProjectionCase(ConvCase):
    """``problem`` is the projection's; fprop's that of the convolution which the projection, ``joins``, is added to."""

    joins: ConvProblem | None = None

    def candidates(self, target: Target) -> list[GemmConfig]:
        if self.kind == "fprop":
            return projection_candidates(self.problem, target)
        if self.kind == "wgrad":
            return candidates(self.problem, "wgrad", target, formed=True)
        return gram_candidates(self.problem, self.kind, target)

    @property
    def bytes(self) -> int:
        return super().bytes + (problems.conv_bytes(self.joins, self.dtype.itemsize) if self.joins else 0)

    @property
    def variant(self) -> str:
        if self.kind == "gram":
            return pass_name("gram")
        return pass_name(self.kind, prologue=self.affine, gram2=True)

    @property
    def before_share(self) -> float:
        return 0.0

    def inputs(self, device: str, *, empty: bool = False) -> Tensors:
        t = super().inputs(device, empty=empty)
        for unused in ("out", "shortcut"):
            t.pop(unused, None)
        p = self.joins or self.problem

        def image() -> torch.Tensor:
            if empty:
                return torch.empty((p.N, p.H, p.W, p.Ci), dtype=self.dtype, device=device).permute(0, 3, 1, 2)
            return tensors.image(p.N, p.Ci, p.H, p.W, self.dtype, device)

        if self.joins:
            acc = torch.float64 if self.dtype == torch.float64 else torch.float32
            t |= {"block_input": image(), "projection": tensors.weight(p, device)}
            t["projection_affine"] = tensors.channels(2, p.Co, device, acc)
        elif self.kind == "dgrad":
            t["x"] = image()
        return t

    def pivot(self, t: Tensors) -> torch.Tensor:
        return pixels(t["x"])

    def ours(self, t: Tensors, config: GemmConfig) -> tuple[torch.Tensor, Any]:
        p = self.problem
        if self.kind == "gram":
            return gram(t["x"], None, config, stride=p.stride, pivot=t.get("pivot"))[:2]
        if self.kind == "wgrad":
            return conv_wgrad(t["x"], t["dy"], p, config, out_dtype=self.dtype, input_mean=t.get("mean")), None
        if self.kind == "dgrad":
            return centring.dgrad(t, t["x"], None, config, stride=p.stride)
        assert self.joins is not None
        joining = Projection(t["block_input"], t["projection"], self.joins, t["projection_affine"])
        affines = {"input_affine": t["affine"], "output_affine": t["output_affine"]}
        return conv_fprop(t["x"], t["w"], p, config, **affines, projection=joining, relu=True, bits=t["bits"])

    def vendor(self, t: Tensors) -> torch.Tensor:
        if self.kind == "gram":
            rows = self._rows(t)
            return rows.T @ rows
        if self.joins is not None:
            return super().vendor(t) + vendor.conv_fprop(t["block_input"], t["projection"], self.joins)
        return super().vendor(t)

    def mathematics(self, t: Tensors, dtype: torch.dtype) -> torch.Tensor:
        acc = torch.promote_types(dtype, torch.float32)
        if self.joins is not None:
            y = vendor.conv_fprop(t["block_input"].to(dtype), t["projection"].to(dtype), self.joins)
            scale, shift = (row.to(acc)[None, :, None, None] for row in t["projection_affine"])
            return super().mathematics({**t, "shortcut": (y.to(acc) * scale + shift).to(dtype)}, dtype)
        if self.kind == "wgrad":
            return super().mathematics(t, dtype)
        p, x = self.problem.sampled(), self._sampled(t).to(dtype)
        dy = centring.centred_gradient(t["dy"].to(dtype), t, p.M)
        return centring.with_products(vendor.conv_dgrad(dy, x, t["w"].to(dtype), p), x, p, t)

    def _sampled(self, t: Tensors) -> torch.Tensor:
        down, right = self.problem.stride
        return t["x"][:, :, ::down, ::right].contiguous(memory_format=NHWC)

    def _rows(self, t: Tensors) -> torch.Tensor:
        return self._sampled(t).permute(0, 2, 3, 1).flatten(0, 2)


def projection_cases(p: ConvProblem) -> Iterator[ProjectionCase]:
    """Of the projection ``p`` of a bottleneck a quarter as wide as its output."""
    last = ConvProblem(p.N, p.P, p.Q, p.Co // 4, p.Co, dtype=p.dtype)
    yield ProjectionCase(last, "fprop", "conv3", affine=True, gram=True, joins=p)
    yield ProjectionCase(p, "dgrad", "projection", gram=True)
    yield ProjectionCase(p, "wgrad", "projection", gram=True)
    if p.stride != (1, 1):  # an unstrided one is measured as that of a normalised input
        yield ProjectionCase(p, "gram", "projection", gram=True)
