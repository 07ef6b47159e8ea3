"""The rule that says a result is right, and the float64 oracle that it measures against.

A candidate is scored beside eager PyTorch in the same dtype, both against a float64 oracle on the same rounded inputs.
ReLU masks flip near zero and would drown real errors, so the mask is *teacher-forced*: the oracle's backward pass uses
the mask of whoever is being scored (``chain(..., masks=...)``).

    R  relative RMS error       <= 1.10 x eager's from 4096 values on, 1.5 x below; float32: 2 x, with a floor of 1e-6
    A  absolute                 relative RMS <= 2^-7.5 for bfloat16, 2^-10.5 for float16, whatever eager does
    M  maximum error            <= 2 x eager's + 1 ulp of max |oracle| (2^-20 of it for float32)
    C  per channel              RMS of any channel with 256 values or more <= 2 x eager's of that channel
    B  bias (``signed``)        mean signed error within 5 sigma, or 1.5 x eager's

Imports torch alone: the tests and the checks on a GPU share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ABSOLUTE = {torch.bfloat16: 2**-7.5, torch.float16: 2**-10.5}
FLOOR = {torch.bfloat16: 0.0, torch.float16: 0.0, torch.float32: 1e-6, torch.float64: 1e-12}
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20, torch.float64: 2**-40}
SIGNED = ("z", "dx")
"""Results whose mean error is checked where the caller does not say."""


@dataclass
class Score:
    """What was measured of one result, and which parts of the rule refused it."""

    name: str
    values: int
    error: float
    eager_error: float
    maximum: float
    eager_maximum: float
    bias: float
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def ratio(self) -> float:
        """Relative RMS error over eager's."""
        return self.error / self.eager_error if self.eager_error else math.inf if self.error else 1.0

    def row(self) -> str:
        verdict = "; ".join(self.failures) or "ok"
        return (
            f"{self.name:<14} {self.values:>10} {self.error:>10.2e} {self.eager_error:>10.2e} {self.ratio:>7.2f} "
            f"{self.maximum:>10.2e} {self.eager_maximum:>10.2e} {self.bias:>10.1e}  {verdict}"
        )


HEADER = (
    f"{'result':<14} {'values':>10} {'rel. RMS':>10} {'eager':>10} {'ratio':>7} "
    f"{'max':>10} {'eager':>10} {'bias':>10}  verdict"
)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _per_channel_rms(t: Tensor, channel_dim: int) -> Tensor:
    return t.movedim(channel_dim, 0).flatten(1).square().mean(dim=1).sqrt()


def score(
    candidate: Tensor,
    eager: Tensor,
    oracle: Tensor,
    name: str,
    *,
    eager_oracle: Tensor | None = None,
    signed: bool | None = None,
    channel_dim: int | None = None,
) -> Score:
    """Measures ``candidate`` and ``eager``, each against its oracle (``eager_oracle`` where the masks differ).

    All tensors have one shape, any device and layout. ``channel_dim`` defaults to 1 for four dimensions, and to none
    (no part C) otherwise. ``signed`` defaults to whether ``name`` ends in z or dx.
    """
    if candidate.shape != oracle.shape or eager.shape != oracle.shape:
        raise AssertionError(f"{name}: shapes {candidate.shape}, eager {eager.shape}, oracle {oracle.shape}")
    dtype = candidate.dtype
    reference = oracle.double()
    eager_reference = reference if eager_oracle is None else eager_oracle.double()
    wrong = candidate.double() - reference
    eager_wrong = eager.double() - eager_reference

    scale, eager_scale = _rms(reference), _rms(eager_reference)
    tiny = torch.finfo(torch.float64).tiny
    result = Score(
        name=name,
        values=candidate.numel(),
        error=_rms(wrong) / max(scale, tiny),
        eager_error=_rms(eager_wrong) / max(eager_scale, tiny),
        maximum=wrong.abs().max().item() if wrong.numel() else 0.0,
        eager_maximum=eager_wrong.abs().max().item() if wrong.numel() else 0.0,
        bias=wrong.mean().item() if wrong.numel() else 0.0,
    )
    if wrong.numel() == 0:
        return result
    if not wrong.isfinite().all():
        bad = int((~wrong.isfinite()).sum())
        result.failures.append(f"{bad} values are not finite where the oracle is")
        return result
    _apply(result, dtype, wrong, eager_wrong, reference, signed, channel_dim)
    return result


def _apply(
    result: Score,
    dtype: torch.dtype,
    wrong: Tensor,
    eager_wrong: Tensor,
    reference: Tensor,
    signed: bool | None,
    channel_dim: int | None,
) -> None:
    """Adds to ``result.failures`` what the rule says against it."""
    floor, half = FLOOR[dtype], dtype in ABSOLUTE
    factor = 2.0 if not half else 1.10 if result.values >= 4096 else 1.5
    bound = max(factor * result.eager_error, floor)
    if result.error > bound:
        result.failures.append(f"R: {result.error:.2e} > {bound:.2e}")
    if half and result.error > ABSOLUTE[dtype]:
        result.failures.append(f"A: {result.error:.2e} > {ABSOLUTE[dtype]:.2e}")

    largest = reference.abs().max().item()
    ulp = ULP[dtype] * (2.0 ** math.floor(math.log2(largest)) if half and largest else largest)
    bound = 2 * result.eager_maximum + ulp
    if result.maximum > bound:
        result.failures.append(f"M: {result.maximum:.2e} > {bound:.2e}")

    if channel_dim is None and wrong.dim() == 4:
        channel_dim = 1
    if channel_dim is not None and wrong.numel() // wrong.shape[channel_dim] >= 256:
        ours, theirs = _per_channel_rms(wrong, channel_dim), _per_channel_rms(eager_wrong, channel_dim)
        # a channel that is exact by chance in eager (all zero, say) still has the accumulator's rounding
        slack = max(floor, 2**-24) * _per_channel_rms(reference, channel_dim)
        excess = ours / torch.maximum(2 * theirs, slack).clamp_min(torch.finfo(torch.float64).tiny)
        if excess.max() > 1:
            channel = int(excess.argmax())
            result.failures.append(f"C: channel {channel}, {ours[channel]:.2e} against eager's {theirs[channel]:.2e}")

    if signed is None:
        signed = result.name.rpartition(".")[2] in SIGNED
    if signed and half:
        sigma = wrong.std().item() / math.sqrt(result.values) if result.values > 1 else math.inf
        bound = max(5 * sigma, 1.5 * abs(eager_wrong.mean().item()))
        if abs(result.bias) > bound:
            result.failures.append(f"B: {result.bias:.2e} beyond {bound:.2e}")


def table(scores: Sequence[Score]) -> str:
    return "\n".join([HEADER, *(s.row() for s in scores)])


def check(candidate: Tensor, eager: Tensor, oracle: Tensor, name: str, **options: Any) -> Score:
    """:func:`score`, raising AssertionError with a table if any part of the rule refuses the candidate."""
    result = score(candidate, eager, oracle, name, **options)
    if not result.ok:
        raise AssertionError(f"{name} is further from the oracle than eager PyTorch allows\n{table([result])}")
    return result


Results = Mapping[str, Any]


def score_all(candidate: Results, eager: Results, oracle: Results, eager_oracle: Results | None = None) -> list[Score]:
    """Scores of every tensor that ``candidate`` names (masks aside)."""
    names = [name for name, value in candidate.items() if isinstance(value, Tensor)]
    forced = oracle if eager_oracle is None else eager_oracle
    return [score(candidate[n], eager[n], oracle[n], n, eager_oracle=forced[n]) for n in names]


def pooled(draws: Sequence[Results]) -> Results:
    """Several draws of one computation as one larger result: the rule over few values is a toss of a coin.

    The same factors hold for all values together, as they would for a result of that size.
    """
    names = [name for name, value in draws[0].items() if isinstance(value, Tensor)]
    return {name: torch.cat([draw[name] for draw in draws]) for name in names} if len(draws) > 1 else draws[0]


def check_all(candidate: Results, eager: Results, oracle: Results, eager_oracle: Results | None = None) -> list[Score]:
    """:func:`score_all`, raising one AssertionError with the table of all results if any is refused."""
    scores = score_all(candidate, eager, oracle, eager_oracle)
    if not all(s.ok for s in scores):
        raise AssertionError(f"refused: {', '.join(s.name for s in scores if not s.ok)}\n{table(scores)}")
    return scores


# ----- conv-BN-ReLU chains: eager in any dtype, the oracle in float64 -----


@dataclass(frozen=True)
class Layer:
    """One conv -> BN (-> ReLU). ``weight`` [Co, Ci / groups, R, S]; ``gamma``, ``beta`` [Co].

    With ``mean`` and ``var`` the statistics are frozen; without them the batch's own normalise.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    relu: bool = True
    mean: Tensor | None = None
    var: Tensor | None = None


class _ForcedReLU(torch.autograd.Function):
    """relu whose gradient passes where ``mask`` says."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return z.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, 0.0), None


def relu_mask(out: Tensor) -> Tensor:
    """Where a ReLU let the gradient through, told from its output (or from its input)."""
    return ~(out <= 0)


def _leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype, copy=True).requires_grad_()


def _conv_bn(x: Tensor, layer: Layer, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    frozen = layer.mean is not None
    mean = None if layer.mean is None else layer.mean.to(gamma.dtype)
    var = None if layer.var is None else layer.var.to(gamma.dtype)
    return F.batch_norm(y, mean, var, gamma, beta, not frozen, 0.0, layer.eps)


def chain(
    x: Tensor,
    layers: Sequence[Layer],
    dout: Tensor,
    *,
    dtype: torch.dtype,
    masks: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    projection: Layer | None = None,
) -> dict[str, Any]:
    """``layers`` in a row and their gradients, in ``dtype`` (parameters of BN: float32, or float64 in float64).

    ``residual`` joins the last layer before its ReLU; or ``projection`` (conv-BN without ReLU) makes it from ``x``.
    ``masks``, one per ReLU, force the backward pass. Results: ``z``, ``dx``, ``dw0`` ``dgamma0`` ``dbeta0`` and so on
    (``dw_p`` ... for the projection), ``dresidual``, and the list ``masks`` that this run itself had.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = _leaf(x, dtype)
    parts = [*layers, *([projection] if projection else [])]
    leaves = [(_leaf(p.weight, dtype), _leaf(p.gamma, wide), _leaf(p.beta, wide)) for p in parts]
    residual = None if residual is None else _leaf(residual, dtype)
    shortcut = residual if projection is None else _conv_bn(x, projection, *leaves[-1])

    own: list[Tensor] = []
    z = x
    for index, layer in enumerate(layers):
        z = _conv_bn(z, layer, *leaves[index])
        if shortcut is not None and index == len(layers) - 1:
            z = z + shortcut
        if layer.relu:
            forced = None if masks is None else masks[len(own)]
            own.append(relu_mask(z.detach()))
            z = z.relu() if forced is None else _ForcedReLU.apply(z, forced)
    z.backward(dout.to(dtype))

    results: dict[str, Any] = {"z": z.detach(), "dx": x.grad}
    for index, part in enumerate(leaves):
        suffix = "_p" if projection is not None and index == len(layers) else str(index)
        for name, leaf in zip(("dw", "dgamma", "dbeta"), part, strict=True):
            results[name + suffix] = leaf.grad
    if residual is not None:
        results["dresidual"] = residual.grad
    results["masks"] = own
    return results


def oracle_chain(
    x: Tensor, layers: Sequence[Layer], dout: Tensor, masks: Sequence[Tensor], **parts: Any
) -> dict[str, Any]:
    """:func:`chain` in float64 with the masks of whoever is scored: what a result is measured against."""
    return chain(x, layers, dout, dtype=torch.float64, masks=masks, **parts)


def check_chain(
    candidate: Results,
    candidate_masks: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    dout: Tensor,
    **parts: Any,
) -> list[Score]:
    """Checks a fused chain's results (named as :func:`chain` names them) in ``x``'s dtype; the scores if all pass."""
    eager = chain(x, layers, dout, dtype=x.dtype, **parts)
    oracle = oracle_chain(x, layers, dout, candidate_masks, **parts)
    eager_oracle = oracle_chain(x, layers, dout, eager["masks"], **parts)
    return check_all(candidate, eager, oracle, eager_oracle)
