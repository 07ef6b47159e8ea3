"""What every route shares: a layer's tensors, its weight as the kernels read it, its statistics, and the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..launch import bn_act, bn_act_grad, bn_stats, bn_sync
from ..launch.bits import empty_bits
from ..launch.cast import cast, is_castable
from ..launch.collective import all_gather
from ..launch.record import note
from ..launch.tiles import StatTiles
from ..plan.config import PassConfig
from ..plan.passes import pass_config, reduce_config
from ..plan.plans import Plan

Tensor = torch.Tensor


class Layer(NamedTuple):
    """The tensors of one convolution and its BN, and what is read at call time.

    ``weight`` is the parameter as the kernels read it (:func:`operands`), ``weight_dtype`` the parameter's own.
    """

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None
    momentum: float
    eps: float
    weight_dtype: torch.dtype

    @property
    def bn(self) -> dict[str, Any]:
        """What finishes its statistics, and the running ones that it updates."""
        return {
            "weight": self.gamma,
            "bias": self.beta,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "momentum": self.momentum,
            "eps": self.eps,
            "counter": self.counter,
        }


def unpacked(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Saved images as they were saved, channels_last: hooks that pack what is saved may give back other strides.

    ``first`` tells for all, unless its own sizes leave it open.
    """
    if first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous():
        return first, *others
    return tuple(t if t.dim() < 4 else t.contiguous(memory_format=torch.channels_last) for t in (first, *others))


class Needs(NamedTuple):
    """Which gradients of one layer are asked for."""

    weight: bool
    bn: bool

    @property
    def any(self) -> bool:
        return self.weight or self.bn


class LayerGrad(NamedTuple):
    weight: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


class Reduced(NamedTuple):
    """The gradient behind a ReLU, and the tiles of its sums."""

    dz: Tensor
    tiles: Tensor


class Passes:
    """The bandwidth-bound kernels with the configurations that the plan's target wants.

    ``sync`` names the group of processes whose rows the statistics are of, or is empty: of this one's alone.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.problem is not None
        self.plan = plan
        self.batch = plan.problem.batch_statistics
        self.sync = plan.problem.sync

    def _config(self, pick: Callable[..., PassConfig], t: Tensor, **more: int) -> PassConfig:
        n, c, h, w = t.shape
        return pick(n * h * w, c, t.element_size(), self.plan.sm_count, interpreter=self.plan.interpreter, **more)

    def stats(self, y: Tensor) -> StatTiles:
        return bn_stats.bn_stats(y, self._config(reduce_config, y))

    def finalize(self, layer: Layer, tiles: StatTiles) -> Tensor:
        return finalize(tiles, self.sync, **layer.bn)

    def act(
        self,
        y: Tensor,
        stats: Tensor,
        residual: Tensor | None = None,
        residual_stats: Tensor | None = None,
        relu: bool = True,
        mask: Tensor | None = None,
    ) -> Tensor:
        config = self._config(pass_config, y)
        options = {"residual": residual, "residual_stats": residual_stats, "bits": mask}
        return bn_act.bn_act(y, stats, config, **options, relu=relu)

    def grad_reduce(
        self,
        dout: Tensor,
        y: Tensor | None,
        stats: Tensor,
        *,
        out: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = True,
        **more: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        read = sum(t is not None for t in (dout, y, out, residual))
        config = self._config(reduce_config, dout, tensors=read + relu)
        options: dict[str, Any] = {"out": out, "residual": residual, "relu": relu, **more}
        return bn_act_grad.bn_act_grad_reduce(dout, y, stats, config, **options)  # type: ignore[return-value]

    def grad_finalize(
        self, tiles: Tensor, stats: Tensor, gamma: Tensor | None, rows: int, *, wants_dy: bool, row: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        return grad_finalize(tiles, stats, gamma, rows, self.sync, wants_dy=wants_dy, row=row)

    def grad_apply(self, dz: Tensor, y: Tensor | None, coeffs: Tensor) -> Tensor:
        return bn_act_grad.bn_grad_apply(dz, y, coeffs, self._config(pass_config, dz))


def empty_mask(plan: Plan, x: Tensor) -> Tensor | None:
    """Memory for the mask of the plan's last ReLU, one bit per element, where the plan keeps it."""
    assert plan.problem is not None
    last = plan.problem.convs[-1]
    return empty_bits((last.N, last.Co, last.P, last.Q), x.device) if plan.keeps_mask else None


def operands(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A chain's weights as the kernels read them: the activations' dtype, [Co, R, S, Ci] in memory.

    Each direction casts anew, by one launch for all: the copies would be kept from forward to backward otherwise.
    """
    by_launch = [w.dtype != dtype and is_castable(w, dtype) for w in weights]
    if not any(by_launch):
        return [_operand(w, dtype) for w in weights]
    copies = iter(cast([w for w, chosen in zip(weights, by_launch, strict=True) if chosen], dtype))
    return [next(copies) if chosen else _operand(w, dtype) for w, chosen in zip(weights, by_launch, strict=True)]


def _operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    converted = weight.to(dtype=dtype, memory_format=torch.channels_last)
    converted = converted.contiguous(memory_format=torch.channels_last)  # a slice stays one in the line above
    if converted is not weight:
        note("cast_weight", 0, (weight, converted), {})
    return converted


def finalize(tiles: StatTiles, sync: str, **bn: Any) -> Tensor:
    """stats [4, C] of the rows in ``tiles``, and of those of the other processes of the group ``sync``, if any.

    ``bn``: the parameters, :attr:`Layer.bn`.
    """
    if sync:
        return finalize_packed(bn_sync.bn_sync_pack(tiles), sync, **bn)
    return bn_stats.bn_finalize(tiles, **bn)


def finalize_packed(packed: Tensor, sync: str, **bn: Any) -> Tensor:
    """The same of what this process has to tell the others."""
    return bn_sync.bn_sync_finalize(all_gather(packed, sync), **bn)


def grad_finalize(
    tiles: Tensor, stats: Tensor, gamma: Tensor | None, rows: int, sync: str, *, wants_dy: bool, row: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgamma, dbeta, coeffs) as ``bn_grad_finalize`` gives them, dy's coefficients by the sums of the whole ``sync``.

    dgamma and dbeta are of this process's rows, as those that data parallelism averages: where nobody ``wants_dy``,
    nobody else is asked, and the coefficients mean nothing.
    """
    if not sync or not wants_dy:
        return bn_act_grad.bn_grad_finalize(tiles, stats, gamma, rows, row=row)
    packed = bn_sync.bn_sync_grad_pack(tiles, rows, row=row)
    return bn_sync.bn_sync_grad_finalize(all_gather(packed, sync), packed, stats, gamma)


def frozen_stats(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """[4, C] rows mean, rstd, scale, shift of each BN of a chain that normalises with its running statistics."""
    return bn_stats.bn_frozen([_frozen(layer) for layer in layers], dtype=x.dtype)


def _frozen(layer: Layer) -> bn_stats.FrozenNorm:
    assert layer.running_mean is not None and layer.running_var is not None
    return bn_stats.FrozenNorm(layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.eps)
