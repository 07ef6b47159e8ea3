"""``explain``: what runs for a model and why, what it costs, and what eager PyTorch costs. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .plan.cost import Cost, Work, floor_seconds, optimizer_cost
from .plan.route import requested, use_route
from .plan.target import Assumption, Target, assume, current, preset, why_not
from .rehearsal import AUTOCAST, LOSS, Share, rehearse

DTYPES = (*AUTOCAST, torch.float32, torch.float64)
GLUE = "around the fused operations"


@dataclass(frozen=True)
class Row:
    """One operation, or the vendor's part of one. FLOPs and bytes are of a whole step, ``floor_us`` its least time.

    ``source``: "fused" (our kernels), "vendor" (the vendor's convolutions, called by our operators) or "eager".
    ``floor_us`` is None where the target is no GPU.
    """

    name: str
    kind: str
    source: str
    route: str
    reason: str
    launches: int
    flops: int
    bytes: int
    saved_bytes: int
    floor_us: float | None


@dataclass(frozen=True)
class Step:
    """The rows of one step and their sums."""

    rows: tuple[Row, ...]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def saved_bytes(self) -> int:
        """Bytes kept from forward for backward, parameters and the input apart."""
        return sum(row.saved_bytes for row in self.rows)

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    @property
    def floor_us(self) -> float | None:
        """The sum of the rows' least times in microseconds; None where the target is no GPU."""
        floors = [row.floor_us for row in self.rows if row.floor_us is not None]
        return sum(floors) if len(floors) == len(self.rows) else None

    def totals(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("flops", "bytes", "saved_bytes", "launches", "floor_us")}


@dataclass(frozen=True)
class Explanation(Step):
    """What :func:`explain` found: ``rows``, their totals as attributes, and ``eager``, the same for eager PyTorch.

    Nothing in it was measured: FLOPs and bytes are counted, ``floor_us`` is a bound from the target's sustained rates.
    """

    eager: Step
    target: Target | None
    dtype: str
    batch: int
    training: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {
            "target": self.target.name if self.target else None,
            "dtype": self.dtype,
            "batch": self.batch,
            "training": self.training,
            "totals": self.totals(),
            "rows": [asdict(row) for row in self.rows],
            "eager": {"totals": self.eager.totals(), "rows": [asdict(row) for row in self.eager.rows]},
        }

    def __str__(self) -> str:
        return _table(self)


def explain(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    example_input: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    target: str | Target | None = None,
    training: bool = True,
    optimizer: str | None = "sgd",
) -> Explanation:
    """What a step of ``model`` runs on ``target``, operation by operation, and why; beside it eager PyTorch's costs.

    ``input_shape`` ([N, C, H, W]) or ``example_input`` gives the input. ``dtype``: bfloat16 and float16 mean autocast
    over the model's parameters, float32 and float64 none. ``target``: a :class:`Target`, "h100", "h200" or "a100"; None
    is what would run here. ``training``: with backward, loss and one step of ``optimizer`` ("sgd" with momentum,
    "adam", "adamw" or None). Modes, layouts and ``requires_grad`` are the model's own; ``input_shape`` is NHWC.
    Needs no GPU, and leaves the model as it was. ValueError, TypeError: bad arguments; KeyError: an unknown target.
    """
    inputs = _inputs(input_shape, example_input, dtype)
    model = unwrapped(model)
    assumed = assumption_of(model, target)
    name = str(dtype).removeprefix("torch.")
    why_plain = assumed.reason or (assumed.target.why_not_dtype(name) if assumed.target else None)
    if requested().route == "reference":
        why_plain = "asked for"
    with assume(assumed):
        with use_route("reference"):
            plain = rehearse(model, inputs, dtype, training)
        shares = plain if why_plain else rehearse(model, inputs, dtype, training)
    rates = assumed.target if assumed.target and not assumed.target.interpreter else None
    step = _optimizer_rows(model, optimizer if training else None, rates)
    return Explanation(
        rows=(*_rows(model, shares, why_plain, rates), *step),
        eager=Step((*_eager_rows(model, plain, rates), *step)),
        target=assumed.target,
        dtype=name,
        batch=int(inputs[0].shape[0]),
        training=training,
    )


# ---------------------------------------------------------------- what is asked


def _inputs(shape: Sequence[int] | None, example: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if (shape is None) == (example is None):
        raise TypeError("give either input_shape or example_input")
    if shape is not None:
        return (image_like(shape, dtype),)
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(t, Tensor) and t.dim() for t in inputs):
        raise TypeError("example_input must be a tensor with a batch dimension, or a sequence of such")
    return inputs


def image_like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The input that a shape stands for: float32 under autocast, NHWC, without data."""
    image = torch.empty(tuple(shape), dtype=torch.float32 if dtype in AUTOCAST else dtype, device="meta")
    return image.contiguous(memory_format=torch.channels_last) if image.dim() == 4 else image


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile or DistributedDataParallel wraps. TypeError for a scripted one."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("a scripted model cannot be explained; give the model that it was made from")
    return model


def assumption_of(model: nn.Module, target: str | Target | None) -> Assumption:
    if isinstance(target, str):
        return Assumption(preset(target))
    if target is not None:
        return Assumption(target)
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    return Assumption(current(device), why_not(device))


# ---------------------------------------------------------------- rows


def _floor_us(work: Iterable[Work], rates: Target | None) -> float | None:
    return None if rates is None else 1e6 * floor_seconds(work, rates)


def _eager_row(
    name: str, kind: str, route: str, reason: str, costs: Sequence[Cost], saved_bytes: int, rates: Target | None
) -> Row:
    launches, flops, moved = (sum(getattr(cost, what) for cost in costs) for what in ("launches", "flops", "bytes"))
    return Row(name, kind, "eager", route, reason, launches, flops, moved, saved_bytes, _floor_us(costs, rates))


def _eager_rows(model: nn.Module, shares: dict[str, Share], rates: Target | None) -> Iterable[Row]:
    for owner, share in shares.items():
        yield _eager_row(_name(owner), _kind(model, owner), "", "", share.costs, share.saved_bytes, rates)


def _optimizer_rows(model: nn.Module, optimizer: str | None, rates: Target | None) -> list[Row]:
    cost = optimizer_cost(model.parameters(), optimizer)
    if not cost.launches:
        return []
    return [_eager_row("optimizer", str(optimizer), "", "one fused step", [cost], 0, rates)]


def _rows(model: nn.Module, shares: dict[str, Share], why_plain: str | None, rates: Target | None) -> Iterable[Row]:
    glue: list[Cost] = []
    for owner, share in shares.items():
        if share.launches:
            yield from _fused_rows(model, owner, share, rates)
            glue += share.costs
        else:
            ours = _is_ours(model, owner)
            reason = (why_plain or "its layers run one by one") if ours else ""
            route = "reference" if ours else ""
            yield _eager_row(_name(owner), _kind(model, owner), route, reason, share.costs, share.saved_bytes, rates)
    if glue:
        yield _eager_row(GLUE, "", "", "casts, counters, sums of gradients", glue, 0, rates)


def _fused_rows(model: nn.Module, owner: str, share: Share, rates: Target | None) -> Iterable[Row]:
    """Our kernels' row, and the vendor's if our operators called it."""
    plans = [plan for plan in share.plans if plan is not None]
    choices = [
        choice
        for plan in plans
        for conv in (*plan.convs, *([plan.projection] if plan.projection else []))
        for choice in (conv.fprop, conv.dgrad, conv.wgrad)
    ]
    reasons = {
        "fused": [plan.reason for plan in plans] or ["the passes take any shape"],
        "vendor": [choice.reason for choice in choices if not choice.fused],
    }
    for source in ("fused", "vendor"):
        launches = [launch for launch in share.launches if launch.kernel.startswith("vendor_") == (source == "vendor")]
        if launches:
            yield Row(
                _name(owner),
                _kind(model, owner),
                source,
                plans[0].route if plans else "staged",
                "; ".join(dict.fromkeys(reasons[source])),
                len(launches),
                sum(launch.flops for launch in launches),
                sum(launch.bytes for launch in launches),
                share.saved_bytes if source == "fused" else 0,
                _floor_us(launches, rates),
            )


def _name(owner: str) -> str:
    return owner or "(model)"


def _kind(model: nn.Module, owner: str) -> str:
    return "cross-entropy" if owner == LOSS else type(model.get_submodule(owner)).__name__


def _is_ours(model: nn.Module, owner: str) -> bool:
    """Whether the owner is one of our operations (and not a network of them)."""

    def ours(module: nn.Module) -> bool:
        return any(
            cls.__module__.startswith(("fused_resnet.modules", "fused_resnet.convert")) for cls in type(module).__mro__
        )

    if owner == LOSS:
        return False
    module = model.get_submodule(owner)
    return ours(module) and not any(ours(below) for below in module.modules() if below is not module)


# ---------------------------------------------------------------- the table


HEADINGS = ("operation", "kind", "source", "launches", "GFLOP", "MB", "saved MB", "floor us", "route", "why")


def _table(explanation: Explanation) -> str:
    reasons = list(dict.fromkeys(row.reason for row in explanation.rows if row.reason))
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in explanation.rows:
        why = f"[{reasons.index(row.reason) + 1}]" if row.reason else ""
        lines.append((row.name, row.kind, row.source, *_figures(row), row.route, why))
    lines.append(("total", "", "", *_figures(explanation), "", ""))
    lines.append(("eager PyTorch", "", "", *_figures(explanation.eager), "", ""))

    widths = [max(map(len, column)) for column in zip(*lines)]
    ruler = "  ".join("-" * width for width in widths)
    printed = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    where = explanation.target.name if explanation.target else "no GPU"
    step = "training step" if explanation.training else "forward"
    return "\n".join(
        [
            f"{step} of batch {explanation.batch} in {explanation.dtype} on {where}; counted, not measured",
            "",
            printed[0],
            ruler,
            *printed[1:-2],
            ruler,
            *printed[-2:],
            "",
            *(f"[{i + 1}] {reason}" for i, reason in enumerate(reasons)),
            _per_image("this plan", explanation, explanation.batch),
            _per_image("eager PyTorch", explanation.eager, explanation.batch),
        ]
    )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    """Figures to the right, words to the left."""
    for heading, cell, width in zip(HEADINGS, line, widths):
        yield cell.ljust(width) if heading in ("operation", "kind", "source", "route", "why") else cell.rjust(width)


def _per_image(label: str, step: Step, batch: int) -> str:
    images = max(batch, 1)
    text = f"{label}: {step.bytes / images / 1e6:.1f} MB and {step.flops / images / 1e9:.2f} GFLOP per image"
    return text + (f"; projected: at most {1e6 * images / step.floor_us:,.0f} images/s" if step.floor_us else "")


def _figures(item: Row | Step) -> tuple[str, ...]:
    floor = "-" if item.floor_us is None else f"{item.floor_us:,.1f}"
    return (
        str(item.launches),
        f"{item.flops / 1e9:,.2f}",
        f"{item.bytes / 1e6:,.1f}",
        f"{item.saved_bytes / 1e6:,.1f}",
        floor,
    )
