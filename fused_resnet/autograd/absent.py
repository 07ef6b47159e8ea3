"""A process without any image, among others that have some: it takes part in their collectives with nothing to tell.

In the order in which they talk, and as one node of the graph, as their operators are: what else a process tells others
in backward (data parallelism its gradients) is then told in one order, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..launch.collective import all_gather
from .layer import finalize_packed

Tensor = torch.Tensor


class Absentee(NamedTuple):
    """What the others compute: ``channels``, ``momenta`` and ``epsilons`` of each BatchNorm, a projection's last."""

    sync: str
    channels: tuple[int, ...]
    momenta: tuple[float, ...]
    epsilons: tuple[float, ...]
    projects: bool = False

    @property
    def order(self) -> list[int]:
        """In which the others talk in forward; in backward the last layer comes first, then the projection's."""
        *before, last = range(len(self.channels) - self.projects)
        return [*before, *([last + 1] if self.projects else []), last]

    def nothing(self, like: Tensor, i: int) -> Tensor:
        """What this process has to tell of layer ``i``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return like.new_zeros(2 * self.channels[i] + 1, dtype=dtype)


class _Absent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        absentee: Absentee,
        shape: tuple[int, ...],
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        for i in absentee.order:
            gamma, beta, mean, var, counter = tensors[6 * i + 1 : 6 * i + 6]
            finalize_packed(
                absentee.nothing(x, i),
                absentee.sync,
                weight=gamma,
                bias=beta,
                running_mean=mean,
                running_var=var,
                momentum=absentee.momenta[i],
                eps=absentee.epsilons[i],
                counter=counter,
            )
        ctx.absentee = absentee
        ctx.save_for_backward(x, residual, *tensors)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, _dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        absentee, wants = ctx.absentee, ctx.needs_input_grad
        x, *_ = ctx.saved_tensors
        count, projects, needs_x = len(absentee.channels), absentee.projects, wants[2]
        layers = [wants[4 + 6 * i : 7 + 6 * i] for i in range(count)]
        *before, last = absentee.order
        for i in (last, *reversed(before)):
            below = [] if projects and i == count - 1 else layers[:i]
            if needs_x or layers[i][0] or any(map(any, below)):
                all_gather(absentee.nothing(x, i), absentee.sync)
        inputs = zip(ctx.saved_tensors, wants[2:], strict=True)
        return None, None, *(torch.zeros_like(t) if wanted else None for t, wanted in inputs)


def absent(
    absentee: Absentee, shape: tuple[int, ...], x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None]
) -> Tensor:
    """An output of ``shape``, which has no element. ``tensors``: of each layer its convolution's weight (None: there is
    none), gamma, beta, running_mean, running_var, counter."""
    return _Absent.apply(absentee, shape, x, residual, *tensors)  # type: ignore[no-any-return]
