"""One chain of convolutions with random data: a forward and backward step of it by any plan or route."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..arguments import BatchNorm, Conv
from ..autograd.chain import FIELDS, SLOTS, conv_chain
from ..functional import conv_bn_chain
from ..plan.plans import ChainProblem, Plan
from ..plan.problem import ConvProblem

TOLERANCE = 2.0**-4
"""Relative, of a tensor's root mean square: two ways of computing a result in 16 bits differ by a hundredth where a
ReLU's mask flips; a wrong tile differs by everything it covers."""


class ChainStep:
    """Tensors for a chain of ``problem``; parameters are float32 where the data are of 16 bits, as under autocast."""

    def __init__(self, problem: ChainProblem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.dtype: torch.dtype = getattr(torch, problem.convs[0].dtype)
        self.generator = torch.Generator(device).manual_seed(0)
        self.parameter_dtype = torch.float32 if self.dtype.itemsize == 2 else self.dtype
        first, last = problem.convs[0], problem.convs[-1]
        self.x = self._image(first.N, first.Ci, first.H, first.W)
        self.residual = self._image(last.N, last.Co, last.P, last.Q) if problem.residual == "given" else None
        self.dout = self._image(last.N, last.Co, last.P, last.Q) * 0.01
        self.layers = [self._layer(conv) for conv in problem.convs]
        self.projection = self._layer(problem.projection) if problem.projection else None
        if problem.backward:
            self.x.requires_grad_(not first.is_stem)
            if self.residual is not None:
                self.residual.requires_grad_()

    def _image(self, n: int, c: int, h: int, w: int) -> Tensor:
        t = torch.randn((n, h, w, c), dtype=torch.float32, device=self.device, generator=self.generator)
        return t.to(self.dtype).permute(0, 3, 1, 2)

    def _layer(self, conv: ConvProblem) -> tuple[Conv, BatchNorm]:
        depth = conv.Ci // conv.groups * conv.taps
        shape = (conv.Co, conv.R, conv.S, conv.Ci // conv.groups)
        weight = torch.randn(shape, device=self.device, generator=self.generator) * (2 / depth) ** 0.5
        rows = torch.rand((4, conv.Co), device=self.device, generator=self.generator) + 0.5
        weight, rows = weight.to(self.parameter_dtype).permute(0, 3, 1, 2), rows.to(self.parameter_dtype)
        gamma, beta, mean, var = rows.unbind(0)
        gamma, beta = gamma.clone(), (beta - 1).clone()
        if self.problem.backward:
            for t in (weight, gamma, beta):
                t.requires_grad_()
        norm = BatchNorm(gamma, beta, mean.clone(), var.clone(), training=self.problem.batch_statistics)
        return Conv(weight, conv.stride, conv.padding, conv.dilation, conv.groups), norm

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that has a gradient."""
        layers = [*self.layers, *([self.projection] if self.projection else [])]
        tensors = [self.x, self.residual, *(t for conv, bn in layers for t in (conv.weight, bn.weight, bn.bias))]
        return [t for t in tensors if t is not None and t.requires_grad]

    def by_plan(self, plan: Plan) -> Callable[[], Tensor]:
        """A step by this very plan."""
        text = plan.encode()
        layers = [*self.layers, *([self.projection] if self.projection else [])]
        fields: list[Tensor | None] = [None] * (SLOTS * len(FIELDS))
        for i, (conv, bn) in enumerate(layers):
            slot = SLOTS - 1 if self.projection is not None and i == len(self.layers) else i
            tensors = (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, None)
            fields[slot * len(FIELDS) : (slot + 1) * len(FIELDS)] = tensors
        momenta, epsilons = tuple(bn.momentum or 0.0 for _, bn in layers), tuple(bn.eps for _, bn in layers)
        return self._step(lambda: conv_chain(text, momenta, epsilons, self.x, self.residual, fields))

    def by_route(self, route: str) -> Callable[[], Tensor]:
        """A step as the public functions make it. RouteUnavailableError, when called, where there is no such route."""
        p = self.problem

        def forward() -> Tensor:
            return conv_bn_chain(
                self.x,
                self.layers,
                self.projection,
                residual=self.residual,
                identity=p.residual == "identity",
                relu=p.relu,
                recompute=p.recompute,
                keep=p.keep,
                route=route,
            )

        return self._step(forward)

    def _step(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def autocast() -> AbstractContextManager[Any]:
            half = self.dtype.itemsize == 2
            return torch.autocast(self.device.type, self.dtype) if half else nullcontext()

        def step() -> Tensor:
            for leaf in self.leaves:
                leaf.grad = None
            with torch.set_grad_enabled(self.problem.backward), autocast():
                out = forward()
            if self.problem.backward:
                out.backward(self.dout)
            return out

        return step

    def results(self, step: Callable[[], Tensor]) -> list[Tensor]:
        """The output and every gradient, copied."""
        out = step()
        grads = [leaf.grad for leaf in self.leaves] if self.problem.backward else []
        return [t.detach().clone() for t in (out, *grads) if t is not None]


def why_wrong(found: list[Tensor], expected: list[Tensor]) -> str:
    """What sets results apart from those of another way, or ""."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if not bool(torch.isfinite(ours).all()):
            return f"result {i} is not finite"
        size = torch.linalg.vector_norm(theirs, dtype=torch.promote_types(theirs.dtype, torch.float32))
        off = float(torch.linalg.vector_norm(ours - theirs, dtype=size.dtype) / size.clamp_min(1e-20))
        if off > TOLERANCE:
            return f"result {i} is off by {off:.2f} of its size"
    return ""
