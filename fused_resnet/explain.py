"""``explain``: what runs for a model and why, what it costs, and what eager PyTorch costs. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .explanation import Explanation, Row, Step
from .launch.record import Launch
from .plan.cost import Cost, Work, floor_seconds, optimizer_cost
from .plan.route import requested, use_route
from .plan.target import Assumption, Target, assume, current, preset, why_not
from .projection import Projection, cost_us, launch_us, projected
from .rehearsal import AUTOCAST, LOSS, Share, rehearse

DTYPES = (*AUTOCAST, torch.float32, torch.float64)
GLUE = "around the fused operations"


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
    "adam", "adamw" or None). Modes, layouts and ``requires_grad`` are the model's own; an ``input_shape`` stands for a
    channels_last tensor. Needs no GPU, and leaves the model as it was. ValueError, TypeError: bad arguments;
    KeyError: an unknown target.
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
    target = assumed.target if assumed.target and not assumed.target.interpreter else None
    clock = Clock(target, projects=dtype in AUTOCAST)
    step = _optimizer_rows(model, optimizer if training else None, clock)
    batch = int(inputs[0].shape[0])
    return Explanation(
        rows=(*_rows(model, shares, why_plain, clock), *step),
        batch=batch,
        eager=Step((*_eager_rows(model, plain, clock), *step), batch),
        target=assumed.target,
        dtype=name,
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
    return inputs_of(example)


def inputs_of(example: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a model is called with. TypeError: no tensors with a batch dimension."""
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(t, Tensor) and t.dim() for t in inputs):
        raise TypeError("example_input must be a tensor with a batch dimension, or a sequence of such")
    return inputs


def image_like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The input that a shape stands for: float32 under autocast, NHWC, without data. TypeError: no sizes."""
    if not all(hasattr(size, "__index__") and size >= 0 for size in shape):
        raise TypeError(f"input_shape must be sizes, as (256, 3, 224, 224), got {shape!r}")
    image = torch.empty(tuple(shape), dtype=torch.float32 if dtype in AUTOCAST else dtype, device="meta")
    return image.contiguous(memory_format=torch.channels_last) if image.dim() == 4 else image


def require_module(model: object, verb: str) -> None:
    """TypeError unless ``model`` is a module; ``verb``: what was asked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a torch.nn.Module, got a {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile or DistributedDataParallel wraps. TypeError for a scripted one, or for none."""
    require_module(model, "explain")
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
    if target is not None and not isinstance(target, Target):
        raise TypeError(f"target must be a Target or the name of one, got a {type(target).__name__}")
    if target is not None:
        return Assumption(target)
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    return Assumption(current(device), why_not(device))


# ---------------------------------------------------------------- rows


class Clock(NamedTuple):
    """What times are told by: the target's rates (None: no GPU), and whether kernels of this dtype were recorded."""

    target: Target | None
    projects: bool

    def floor_us(self, work: Iterable[Work]) -> float | None:
        return None if self.target is None else 1e6 * floor_seconds(work, self.target)

    def projected_us(self, work: Iterable[Cost | Launch]) -> Projection | None:
        if self.target is None or not self.projects:
            return None
        times = (
            launch_us(item, self.target) if isinstance(item, Launch) else cost_us(item, self.target) for item in work
        )
        return projected(times, self.target)


def _eager_row(
    name: str, kind: str, route: str, reason: str, costs: Sequence[Cost], saved_bytes: int, clock: Clock
) -> Row:
    launches, flops, moved = (sum(getattr(cost, what) for cost in costs) for what in ("launches", "flops", "bytes"))
    return Row(
        name,
        kind,
        "eager",
        route,
        reason,
        launches,
        flops,
        moved,
        saved_bytes,
        clock.floor_us(costs),
        clock.projected_us(costs),
    )


def _eager_rows(model: nn.Module, shares: dict[str, Share], clock: Clock) -> Iterable[Row]:
    for owner, share in shares.items():
        yield _eager_row(_name(owner), _kind(model, owner), "", "", share.costs, share.saved_bytes, clock)


def _optimizer_rows(model: nn.Module, optimizer: str | None, clock: Clock) -> list[Row]:
    cost = optimizer_cost(model.parameters(), optimizer)
    if not cost.launches:
        return []
    return [_eager_row("optimizer", str(optimizer), "", "one fused step", [cost], 0, clock)]


def _rows(model: nn.Module, shares: dict[str, Share], why_plain: str | None, clock: Clock) -> Iterable[Row]:
    glue: list[Cost] = []
    for owner, share in shares.items():
        if share.launches:
            yield from _fused_rows(model, owner, share, clock)
            glue += share.costs
        else:
            ours = _is_ours(model, owner)
            reason = (why_plain or "its layers run one by one") if ours else ""
            route = "reference" if ours else ""
            yield _eager_row(_name(owner), _kind(model, owner), route, reason, share.costs, share.saved_bytes, clock)
    if glue:
        yield _eager_row(GLUE, "", "", "casts, counters, sums of gradients", glue, 0, clock)


def _fused_rows(model: nn.Module, owner: str, share: Share, clock: Clock) -> Iterable[Row]:
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
                clock.floor_us(launches),
                clock.projected_us(launches),
            )


def _name(owner: str) -> str:
    return owner or "(model)"


def _kind(model: nn.Module, owner: str) -> str:
    return "cross-entropy" if owner == LOSS else type(model.get_submodule(owner)).__name__


def _is_ours(model: nn.Module, owner: str) -> bool:
    """Whether the owner is one of our operations (and not a network of them)."""

    def ours(module: nn.Module) -> bool:
        return any(
            cls.__module__.startswith(("fused_resnet.modules", "fused_resnet.families")) for cls in type(module).__mro__
        )

    if owner == LOSS:
        return False
    module = model.get_submodule(owner)
    return ours(module) and not any(ours(below) for below in module.modules() if below is not module)
