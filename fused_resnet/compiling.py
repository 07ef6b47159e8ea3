"""``warmup``: compiles what a model's step needs before the step, in parallel, and measures what is fastest."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import nn

from .compile_worker import Job, TensorArgument
from .explain import assumption_of, image_like, unwrapped
from .plan import store
from .plan.route import requested
from .plan.target import Target, assume
from .rehearsal import rehearse
from .tuning.stopwatch import Stopwatch
from .tuning.tune import chains_of, logger, on_every_rank, tune_chains

FEW = 4
"""Kernels that one process compiles before a second one has started."""


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
    jobs: dict[Any, Job] = {}

    def collect(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        job = _job(kernel, arguments, options)
        jobs.setdefault(_key(kernel, job), job)

    with assume(assumed):
        rehearse(model, [image_like(input_shape, dtype)], dtype, training, collect)
    compile_all(list(jobs.values()), found.sm, workers)
    return len(jobs)


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


def compile_all(jobs: Sequence[Job], capability: int, workers: int | None = None) -> None:
    """Compiles ``jobs`` for ``capability`` in processes of their own. RuntimeError with all that failed."""
    workers = max(1, min(workers or min(os.cpu_count() or 1, 16), -(-len(jobs) // FEW)))
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-m", "fused_resnet.compile_worker"], {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    shares = [jobs[i::workers] for i in range(workers) if jobs[i::workers]]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        for _ in shares
    ]
    try:
        for process, share in zip(processes, shares, strict=True):
            assert process.stdin is not None
            process.stdin.write(pickle.dumps((capability, share)))
            process.stdin.close()
            process.stdin = None
        failed: list[str] = []
        for process in processes:
            out, err = process.communicate()
            failed += json.loads(out) if process.returncode == 0 else [err.decode(errors="replace")[-500:]]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed:
        raise RuntimeError(f"{len(failed)} kernels do not compile for sm_{capability}: " + "; ".join(failed))


def _job(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Job:
    described = {name: _described(value) for name, value in arguments.items()}
    return Job(kernel.fn.__module__, kernel.fn.__name__, described, options)


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorArgument(value.dtype, value.data_ptr() % 16 == 0)
    return type(value)(*map(_described, value)) if isinstance(value, tuple) else value


def _key(kernel: Any, job: Job) -> tuple[Any, ...]:
    """Equal for two jobs of equal code: of a number, Triton sees whether it is one, a multiple of 16, and how wide."""
    constants = {name for name, kind in kernel.fn.__annotations__.items() if kind is tl.constexpr}

    def specialised(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, TensorArgument):
            return tuple(specialised(name, item) for item in value)
        if name in constants or isinstance(value, (bool, TensorArgument)) or not isinstance(value, int):
            return repr(value) if name in constants or isinstance(value, TensorArgument) else type(value)
        return value == 1, value % 16 == 0, value >= 2**31

    return (
        job.module,
        job.kernel,
        tuple((name, specialised(name, value)) for name, value in job.arguments.items()),
        tuple(job.options.items()),
    )
