"""Compiles kernels ahead, in processes of their own, into the cache that the measuring process reads.

A worker needs no GPU: Triton is told what the target is, tensors are uninitialised memory on the CPU that nobody
touches, and every launch stops after the compilation.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from fused_resnet import compile_worker

from .cases import ConvCase


def become_compiler(capability: int) -> None:
    """From here on this process compiles what it is asked to launch, for ``capability``, and launches nothing."""
    from triton.runtime import JITFunction

    compile_worker.become_compiler(capability)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: run(self, *args, **{**kwargs, "warmup": True})


def compile_case(case: ConvCase, config: Any) -> str:
    """Compiles one; says what was wrong, or nothing."""
    try:
        case.ours(case.inputs("cpu", empty=True), config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


class Ahead:
    """Compilations under way, by (case, config). ``wait`` returns when one is done (or hopeless)."""

    def __init__(self, jobs: Iterable[tuple[ConvCase, Any]], capability: int, *, workers: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        workers = workers or max(1, min(15, (os.cpu_count() or 2) - 1))
        self._pool = ProcessPoolExecutor(workers, context, become_compiler, (capability,))
        self._futures: dict[tuple[ConvCase, Any], Future[str]] = {}
        self.add(jobs)

    def add(self, jobs: Iterable[tuple[ConvCase, Any]]) -> None:
        """Begins these as well, if they have not begun."""
        for case, config in jobs:
            if (case, config) not in self._futures:
                self._futures[case, config] = self._pool.submit(compile_case, case, config)

    def wait(self, case: ConvCase, config: Any, timeout: float = 40) -> str:
        future = self._futures.get((case, config))
        if future is None:
            return ""
        try:
            return future.result(timeout)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:500]

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
