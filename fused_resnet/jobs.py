"""What is to be compiled, and its compilation in parallel, by processes of their own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton.language as tl

from .compile_worker import Job, TensorArgument
from .launch.record import Rehearsed

FEW = 4
"""Kernels that one process compiles before a second one has started."""


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


class Jobs:
    """Collects launches that would happen, each piece of code once: its ``collect`` is an ``OnKernel``."""

    def __init__(self) -> None:
        self._found: dict[Any, Job] = {}

    def collect(self, found: Rehearsed) -> Job:
        """The first job that was found of the same code."""
        job = _job(found.kernel, found.arguments, found.options)
        return self._found.setdefault(_key(found.kernel, job), job)

    @property
    def distinct(self) -> list[Job]:
        return list(self._found.values())


def _job(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Job:
    arguments = {name: described(value) for name, value in arguments.items()}
    return Job(kernel.fn.__module__, kernel.fn.__name__, arguments, options)


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorArgument(value.dtype, value.data_ptr() % 16 == 0)
    return type(value)(*map(described, value)) if isinstance(value, tuple) else value


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
