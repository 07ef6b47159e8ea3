"""``warmup``: compiles what a model's step needs before the step, in parallel, and measures what is fastest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from .explain import assumption_of, image_like, unwrapped
from .jobs import Jobs, compile_all
from .plan import store
from .plan.route import requested
from .plan.target import Target, assume
from .rehearsal import rehearse
from .tuning.stopwatch import Stopwatch
from .tuning.tune import chains_of, logger, on_every_rank, tune_chains


def warmup(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = True,
    target: str | Target | None = None,
    workers: int | None = None,
    tune: bool = False,
    minutes: float = 5.0,
) -> int:
    """Compiles every kernel that a step of ``model`` launches; returns how many there are.

    ``input_shape`` is [N, C, H, W]; ``dtype``, ``training`` and ``target`` are those of :func:`explain`: a 16-bit dtype
    means autocast, ``training`` a backward pass too, and without a ``target`` it is the GPU that the model is on (for a
    model that is on none there is nothing to compile). Nothing runs, and the model is not touched. ``workers``
    processes, by default one per processor and at most 16, compile into Triton's cache on disk, where later runs and
    other processes find the result: every rank may call this. RuntimeError: kernels that do not compile, by name.

    ``tune``: first measures, for at most about so many ``minutes``, which configuration of each kernel and which route
    of each block is the fastest on the model's GPU, and keeps that on disk, where later processes find it; what is
    there already is not measured again. Plans follow it from then on, so compile a model with torch.compile afterwards.
    In a process group rank 0 measures and every rank follows its table: call it on all of them. Where there is no GPU
    to measure on, that is a warning.
    """
    store.load()
    model = unwrapped(model)
    assumed = assumption_of(model, target)
    found = assumed.target
    if tune:
        _tune(model, input_shape, dtype, training, minutes, measurable(model, target))
    if found is None or found.interpreter or requested().route == "reference":
        return 0
    jobs = Jobs()
    with assume(assumed):
        rehearse(model, [image_like(input_shape, dtype)], dtype, training, jobs.collect)
    compile_all(jobs.distinct, found.sm, workers)
    return len(jobs.distinct)


def measurable(model: nn.Module, target: str | Target | None) -> tuple[Target | None, str]:
    """The GPU that ``model`` is on, as kernels can be timed there; or None and why they cannot."""
    if target is not None:
        return None, "kernels are timed on the GPU that a model is on, not on one that is described"
    if requested().route == "reference":
        return None, "the reference route was asked for"
    here = assumption_of(model, None)
    if here.target is not None and here.target.interpreter:
        return None, "in Triton's interpreter no time means anything"
    return here.target, here.reason or ""


def _tune(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    training: bool,
    minutes: float,
    here: tuple[Target | None, str],
) -> None:
    target, reason = here
    parameter = next(iter([*model.parameters(), *model.buffers()]), None)

    def measure() -> store.Remembered | None:
        if target is None or parameter is None:
            return None
        chains = chains_of(model, [image_like(input_shape, dtype)], dtype, training, target)
        with torch.cuda.device(parameter.device) if parameter.device.type == "cuda" else nullcontext():
            return tune_chains(chains, target, parameter.device, minutes, Stopwatch(parameter.device), logger.info)

    if not on_every_rank(measure, target) and target is None:
        warnings.warn(f"fused_resnet.warmup(tune=True) cannot measure: {reason}; plans stay as they are", stacklevel=3)
