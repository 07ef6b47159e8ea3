"""The operator behind ConvBNReLU, BasicBlock and Bottleneck: conv -> BN -> ReLU up to three times, and a residual.

Two ``torch.library`` operators that a compiler sees as opaque calls, with fakes of exact shapes and strides, and an
``autograd.Function`` over them. An operator's outputs are a fixed tuple: what a plan does not produce is an empty
tensor. The plan travels as a string, so that backward runs what forward decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..launch.gram_bn import moments_size
from ..launch.nhwc import nhwc
from ..plan.plans import ChainProblem, decode
from ..plan.problem import ConvProblem
from . import staged_backward, staged_forward
from .layer import Layer, Needs, empty_mask, operands, unpacked
from .library import define, refuse_second_derivative
from .staged_forward import Saved

Tensor = torch.Tensor

SLOTS = 4
"""Three convolutions, and the projection's."""
FIELDS = ("weight", "gamma", "beta", "running_mean", "running_var", "counter")


def _slot_schema(i: int) -> str:
    written = ("running_mean", "running_var", "counter")
    aliases = "abcdefghijkl"[len(written) * i :]
    return ", ".join(
        [f"Tensor? {field}{i}" for field in FIELDS if field not in written]
        + [f"Tensor({alias}!)? {field}{i}" for alias, field in zip(aliases, written, strict=False)]
    )


FORWARD_SCHEMA = (
    "chain_forward(str plan, float[] momenta, float[] epsilons, Tensor x, Tensor? residual, "
    + ", ".join(_slot_schema(i) for i in range(SLOTS))
    + ") -> ("
    + ", ".join(["Tensor"] * (5 + 2 * SLOTS))
    + ")"
)
SAVED = ("Tensor? weight", "Tensor? gamma", "Tensor? beta", "Tensor y", "Tensor stats")
"""What backward takes of each slot, field by field."""
BACKWARD_SCHEMA = (
    "chain_backward(str plan, bool[] needs, Tensor dout, Tensor x, Tensor mask, "
    + ", ".join(f"{field}{i}" for field in SAVED for i in range(SLOTS))
    + ", Tensor moments, Tensor projection_moments, Tensor a1) -> ("
    + ", ".join(["Tensor"] * (2 + 3 * SLOTS))
    + ")"
)


def _image(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _slots(problem: ChainProblem) -> list[int]:
    """The slot of each layer: the convolutions from the front, the projection's last."""
    return [*range(len(problem.convs)), *([SLOTS - 1] if problem.projection else [])]


def _convs(problem: ChainProblem) -> list[ConvProblem]:
    return [*problem.convs, *([problem.projection] if problem.projection else [])]


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _no_mask(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


def _or_none(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


# ---------------------------------------------------------------- forward


def _chain_forward(
    plan: str,
    momenta: Sequence[float],
    epsilons: Sequence[float],
    x: Tensor,
    residual: Tensor | None,
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    decoded = decode(plan)
    assert decoded.problem is not None
    slots = _slots(decoded.problem)
    fields = [tensors[len(FIELDS) * slot : len(FIELDS) * (slot + 1)] for slot in slots]
    weights = [weight for weight, *_ in fields if weight is not None]
    read = operands(weights, x.dtype)
    layers = [
        Layer(read[i], *fields[i][1:], momenta[i], epsilons[i], weights[i].dtype)  # type: ignore[call-arg, arg-type]
        for i in range(len(slots))
    ]
    out, saved = staged_forward.forward(decoded, x, residual, layers)
    ys = [_none(x) for _ in range(SLOTS)]
    stats = [_none(x) for _ in range(SLOTS)]
    if decoded.problem.backward:
        for slot, y, s in zip(slots, saved.ys, saved.stats, strict=True):
            ys[slot], stats[slot] = _none(x) if y is None else y, s
    if "y1" in decoded.problem.recompute:
        ys[0] = _none(x)
    mask = _no_mask(x) if saved.mask is None else saved.mask
    kept = (saved.moments, saved.projection_moments, saved.a1) if decoded.problem.backward else (None, None, None)
    return out, mask, *ys, *stats, *(_none(x) if t is None else t for t in kept)


def _chain_forward_fake(
    plan: str,
    momenta: Sequence[float],
    epsilons: Sequence[float],
    x: Tensor,
    residual: Tensor | None,
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    decoded = decode(plan)
    problem = decoded.problem
    assert problem is not None
    last = problem.convs[-1]
    n = x.shape[0]
    ys = [_none(x) for _ in range(SLOTS)]
    stats = [_none(x) for _ in range(SLOTS)]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if problem.backward:
        for slot, conv in zip(_slots(problem), _convs(problem), strict=True):
            stats[slot] = torch.empty((4, conv.Co), dtype=dtype, device=x.device)
            if problem.batch_statistics or slot < len(problem.convs) - 1:
                ys[slot] = _image(x, n, conv.Co, conv.P, conv.Q)
    if "y1" in problem.recompute:
        ys[0] = _none(x)
    moments = [_none(x), _none(x)]
    unwritten = [(len(problem.convs) - 1, last)] if decoded.gram is not None else []
    if decoded.gram_projection is not None and problem.projection is not None:
        unwritten.append((SLOTS - 1, problem.projection))
    if problem.backward:
        for i, (slot, conv) in enumerate(unwritten):
            ys[slot] = torch.empty((conv.Co, conv.Ci), dtype=dtype, device=x.device)
            moments[i] = torch.empty((moments_size(conv.Co, conv.Ci, x.dtype),), dtype=dtype, device=x.device)
    mask = empty_mask(decoded, x)
    mask = _no_mask(x) if mask is None else mask
    a1 = _none(x)
    if decoded.keeps_a1:
        first = problem.convs[0]
        a1 = _image(x, n, first.Co, first.P, first.Q)
    return _image(x, n, last.Co, last.P, last.Q), mask, *ys, *stats, *moments, a1


# ---------------------------------------------------------------- backward


def _by_field(saved: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """Each of ``SAVED``: of all slots."""
    return tuple([saved[SLOTS * i : SLOTS * (i + 1)] for i in range(len(SAVED))])


def _chain_backward(
    plan: str,
    needs: Sequence[bool],
    dout: Tensor,
    x: Tensor,
    mask: Tensor,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    decoded = decode(plan)
    assert decoded.problem is not None
    dout = nhwc(dout)
    weights, gammas, betas, ys, stats = _by_field(saved)
    moments, projection_moments, a1 = saved[len(SAVED) * SLOTS :]
    slots = _slots(decoded.problem)
    parameters = [weight for weight in (weights[slot] for slot in slots) if weight is not None]
    layers = [
        Layer(read, gammas[slot], betas[slot], None, None, None, 0.0, 0.0, parameter.dtype)
        for slot, read, parameter in zip(slots, operands(parameters, x.dtype), parameters, strict=True)
    ]
    formed = (_or_none(moments), _or_none(projection_moments), _or_none(a1))
    kept = Saved(_or_none(mask), [_or_none(ys[i]) for i in slots], [stats[i] for i in slots], *formed)
    wanted = [Needs(needs[2 + 3 * i], needs[3 + 3 * i] or needs[4 + 3 * i]) for i in slots]
    dx, dresidual, grads = staged_backward.backward(decoded, dout, x, layers, kept, wanted, needs[0], needs[1])
    flat: list[Tensor | None] = [None] * (3 * SLOTS)
    for slot, grad in zip(slots, grads, strict=True):
        flat[3 * slot : 3 * slot + 3] = grad.weight, _like(grad.gamma, gammas[slot]), _like(grad.beta, betas[slot])
    # An operator's output must not be its input: without a ReLU the residual's gradient would be dout itself.
    if dresidual is not None and dresidual.data_ptr() == dout.data_ptr():
        dresidual = dresidual.clone(memory_format=torch.preserve_format)
    return tuple([_none(x) if t is None else t for t in (dx, dresidual, *flat)])


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient that has a parameter, in its dtype."""
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


def _chain_backward_fake(
    plan: str,
    needs: Sequence[bool],
    dout: Tensor,
    x: Tensor,
    mask: Tensor,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    weights, gammas, betas, _, _ = _by_field(saved)
    result = [
        torch.empty_like(x, memory_format=torch.channels_last) if needs[0] else _none(x),
        torch.empty_like(dout, memory_format=torch.channels_last) if needs[1] else _none(x),
    ]
    for i in range(SLOTS):
        weight, gamma, beta = weights[i], gammas[i], betas[i]
        needs_weight, *needs_bn = needs[2 + 3 * i : 5 + 3 * i]
        if weight is not None and needs_weight:
            result.append(torch.empty_like(weight, memory_format=torch.channels_last))
        else:
            result.append(_none(x))
        for parameter in (gamma, beta):
            wanted = parameter is not None and any(needs_bn)
            result.append(torch.empty_like(parameter) if wanted else _none(x))  # type: ignore[arg-type]
    return tuple(result)


chain_forward = define(FORWARD_SCHEMA, _chain_forward, _chain_forward_fake)
chain_backward = define(BACKWARD_SCHEMA, _chain_backward, _chain_backward_fake)


_GRADS = (3, 4, *[5 + len(FIELDS) * slot + field for slot in range(SLOTS) for field in range(3)])
"""Where that stands among the arguments of :class:`_Chain` of which ``chain_backward`` returns the gradients."""
_YS = slice(2 + 3 * SLOTS, 2 + 4 * SLOTS)
"""Where the convolutions' outputs stand among what :class:`_Chain` saves."""


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: str,
        momenta: tuple[float, ...],
        epsilons: tuple[float, ...],
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        out, mask, *rest = chain_forward(plan, momenta, epsilons, x, residual, *tensors)
        ctx.plan = plan
        parameters = [t for field in range(3) for t in tensors[field :: len(FIELDS)]]
        ctx.save_for_backward(x, mask, *parameters, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        x, a1, *ys = unpacked(saved[0], saved[-1], *saved[_YS])
        wants = ctx.needs_input_grad
        needs = tuple([wants[i] for i in _GRADS])
        grads = refuse_second_derivative(
            chain_backward, ctx.plan, needs, dout, x, *saved[1 : _YS.start], *ys, *saved[_YS.stop : -1], a1
        )
        result: list[Tensor | None] = [None] * len(wants)
        for i, needed, grad in zip(_GRADS, needs, grads, strict=True):
            if needed:
                result[i] = grad
        return tuple(result)


def conv_chain(
    plan: str,
    momenta: tuple[float, ...],
    epsilons: tuple[float, ...],
    x: Tensor,
    residual: Tensor | None,
    tensors: Sequence[Tensor | None],
) -> Tensor:
    """Runs an encoded plan. ``x`` and ``residual`` are channels_last; ``tensors``: the FIELDS of each of the SLOTS."""
    return _Chain.apply(plan, momenta, epsilons, x, residual, *tensors)  # type: ignore[no-any-return]
