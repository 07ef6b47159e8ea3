"""A model's chains of convolutions, measured most valuable first, and the same table on every rank."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..plan import store, tables
from ..plan.defaults import default_config
from ..plan.estimate import gain_us
from ..plan.plans import ChainProblem
from ..plan.route import use_route
from ..plan.store import Remembered
from ..plan.target import Assumption, Target, assume
from ..rehearsal import rehearse
from .measure import ChainTuner, Say
from .stopwatch import Stopwatch

logger = logging.getLogger("fused_resnet")


def chains_of(
    model: nn.Module, inputs: Sequence[torch.Tensor], dtype: torch.dtype, training: bool, target: Target
) -> Counter[ChainProblem]:
    """The chains that a step of ``model`` runs on ``target``, and how often each; whatever route they take today."""
    with assume(Assumption(target)), use_route("staged"):
        shares = rehearse(model, inputs, dtype, training)
    problems = [plan.problem for share in shares.values() for plan in share.plans if plan and plan.problem]
    found = Counter(replace(problem, sync="") for problem in problems)  # what is measured is one process's work
    return Counter({problem: -(-count // (1 + problem.backward)) for problem, count in found.items()})


def predicted_gain_us(problem: ChainProblem, target: Target) -> float:
    """What measuring a chain may gain: how far its passes, unmeasured, should be from their floors."""
    kinds = ("fprop", "dgrad", "wgrad") if problem.backward else ("fprop",)
    convs = [*problem.convs, *([problem.projection] if problem.projection else [])]
    return sum(gain_us(conv, kind, target, default_config(conv, kind, target)) for conv in convs for kind in kinds)


def tune_chains(
    chains: Counter[ChainProblem], target: Target, device: torch.device, minutes: float, stopwatch: Stopwatch, say: Say
) -> Remembered:
    """Measures what was not measured on this machine yet, most valuable first, until the time is up.

    Each result is written before the next begins. Returns everything that this machine knows of ``target``.
    """
    end, run = time.monotonic() + 60 * minutes, store.new_run()
    known, fresh = known_of(target), Remembered(store.identity(target))
    ordered = sorted(chains, key=lambda problem: -chains[problem] * predicted_gain_us(problem, target))
    left = [problem for problem in ordered if tables.chain_key(problem) not in known.routes]
    for i, problem in enumerate(left):
        if time.monotonic() >= end:
            say(f"the time is up: {len(left) - i} of {len(ordered)} kinds of blocks are left; calling again goes on")
            break
        name = (
            f"{'-'.join(f'{conv.R}x{conv.S}' for conv in problem.convs)} {problem.convs[0].H}px {problem.convs[0].Ci}"
        )
        say(f"[{i + 1}/{len(left)}] {name}->{problem.convs[-1].Co}, {chains[problem]} times")
        found = Remembered(store.identity(target))
        try:
            ChainTuner(problem, target, device, stopwatch, known, found, say).run()
        except Exception as error:  # out of memory, a device's error: this chain keeps its plan, the others go on
            say(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}")
            _release(device)
            continue
        known.add(found)
        fresh.add(found)
        _release(device)
        _keep(fresh, run, say)
    return known


def _keep(table: Remembered, run: str, say: Say) -> None:
    try:
        store.write(table, run)
    except OSError as error:
        say(f"what was measured cannot be kept for later processes: {error}")


def known_of(target: Target) -> Remembered:
    """What this machine's disk holds of ``target``."""
    wanted = store.identity(target)
    return next((table for table in store.read()[0] if table.identity == wanted), Remembered(wanted))


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def on_every_rank(measure: Callable[[], Remembered | None], target: Target | None) -> bool:
    """Rank 0 measures; every rank then plans by its table, and keeps it on its own disk. Whether there is one.

    RuntimeError on every rank where rank 0 failed. Without an initialised process group this process is its own rank 0.
    """
    grouped = dist.is_available() and dist.is_initialized()
    message: list[Any] = [None]
    failure: Exception | None = None
    if not grouped or dist.get_rank() == 0:
        try:
            measured = measure()
            message = [None if measured is None else measured.to_dict()]
        except Exception as error:  # the others wait: they must hear of it
            message, failure = [f"{type(error).__name__}: {error}"], error
    if grouped:
        dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        raise RuntimeError(f"fused_resnet.warmup could not measure on rank 0: {message[0]}") from failure
    if message[0] is None or target is None:
        return False
    table = Remembered.from_dict(message[0])
    if table.identity != store.identity(target):
        logger.warning(
            "rank 0 measured on %s, and this is %s: it follows its own table", table.identity.gpu, target.name
        )
        return False
    tables.install(target.name, target.sm, message[0])
    if grouped and dist.get_rank() != 0 and known_of(target) != table:
        _keep(table, store.new_run(), logger.info)
    return True
