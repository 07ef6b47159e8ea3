"""Whether the kernels of a plan compile here: asked before the plan first runs, while another can still be taken.

A compiler that is missing, or that fails on one kernel, must not end a training run: the chain is planned again by the
staged route, and at last by plain PyTorch. What is compiled stays in Triton's caches, so the first step does no work
twice; a rehearsal on meta tensors, which tells what is to be compiled, is all that this costs.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from ..launch.record import Rehearsed, rehearse_launches
from ..plan import planner
from ..plan.plans import ChainProblem, decode
from ..plan.target import Target, current
from . import chain

REFUSALS = (TritonError, RuntimeError, OSError, SubprocessError)
"""What a compiler, an assembler or their absence raises. Anything else says nothing about the kernel."""

ROUTE = 7
"""The place of the route in what :func:`chain_plan_text` calls ``problem``."""


@torch.compiler.assume_constant_result
def chain_plan_text(
    device: torch.device, dtype: str, *problem: Any, parameters: str, sync: str = ""
) -> tuple[str, str, str]:
    """:func:`planner.chain_plan_text` with the same arguments, of a plan whose kernels compile on ``device``.

    ``parameters``: the dtype of the weights. Where a plan fails, the reason of what is taken instead says why.
    """
    planned = planner.chain_plan_text(device, dtype, *problem, sync=sync)
    complaint = refusal = _why_not(planned[0], device, parameters)
    for route in ("staged", "reference") if complaint else ():
        if refusal:
            asked = (*problem[:ROUTE], route, *problem[ROUTE + 1 :])
            text, taken, _ = planner.chain_plan_text(device, dtype, *asked, sync=sync)
            planned, refusal = (text, taken, complaint), _why_not(text, device, parameters)
    # A warning would disturb a compiler's tracing, and plain PyTorch is mentioned by whoever takes it.
    if complaint and planned[0] and not torch.compiler.is_compiling():
        _say(f"{complaint}; the route {planned[1]!r} is taken instead")
    return planned


def _why_not(text: str, device: torch.device, parameters: str) -> str:
    if not text or device.type != "cuda":
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _compile(text, index, parameters)


@lru_cache(maxsize=256)
def _say(sentence: str) -> None:
    """Once."""
    warnings.warn(f"fused_resnet: {sentence}", stacklevel=5)


@lru_cache(maxsize=4096)
def _compile(text: str, index: int, parameters: str) -> str:
    """Compiles what the plan launches; the first failure in words, or ""."""
    failures: list[str] = []
    target = current(torch.device("cuda", index))

    def on_kernel(found: Rehearsed) -> None:
        if not failures:
            try:
                compiled = compile_kernel(found.kernel, found.arguments, found.options)
                if target is not None:
                    check_resources(compiled, target)
            except REFUSALS as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
                detail = f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"
                failures.append(f"{found.kernel.fn.__name__} does not compile here ({detail})")

    try:
        with torch.cuda.device(index), rehearse_launches(on_kernel), torch.no_grad():
            rehearse_chain(text, getattr(torch, parameters))
    except Exception as error:  # a mistake of the question is no answer: the plan runs, as it would unasked
        if not torch.compiler.is_compiling():
            _say(f"whether a plan's kernels compile could not be asked ({type(error).__name__}: {error})")
    return failures[0] if failures else ""


def compile_kernel(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """Into the caches that a launch with these arguments reads; what Triton made of it."""
    return kernel.warmup(**arguments, **options, grid=(1,))


def check_resources(compiled: Any, target: Target) -> None:
    """OutOfResources, which Triton raises at the first launch alone, if a program cannot have what it asks for."""
    metadata = getattr(compiled, "metadata", None)  # None where a hook of Triton's had it compiled elsewhere
    asked = metadata.shared if metadata else 0
    if asked > target.shared_memory:
        raise OutOfResources(asked, target.shared_memory, "shared memory")


def rehearse_chain(text: str, parameters: torch.dtype) -> None:
    """The operators' own code for an encoded plan, forward and backward, on meta tensors."""
    problem = decode(text).problem
    assert problem is not None
    dtype: torch.dtype = getattr(torch, problem.convs[0].dtype)

    def image(n: int, c: int, h: int, w: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty((n, c, h, w), dtype=of, device="meta", memory_format=torch.channels_last)

    layers = [*problem.convs, *([problem.projection] if problem.projection else [])]
    tensors: list[Tensor | None] = [None] * (chain.SLOTS * len(chain.FIELDS))
    for slot, conv in zip(chain._slots(problem), layers, strict=True):
        weight = image(conv.Co, conv.Ci // conv.groups, conv.R, conv.S, parameters)
        row = torch.empty(conv.Co, dtype=torch.promote_types(parameters, torch.float32), device="meta")
        tensors[slot * len(chain.FIELDS) : (slot + 1) * len(chain.FIELDS)] = [weight, row, row, row, row, None]
    first, last = problem.convs[0], problem.convs[-1]
    x = image(first.N, first.Ci, first.H, first.W)
    out = image(last.N, last.Co, last.P, last.Q)
    count = len(layers)
    given = out if problem.residual == "given" else None
    result, mask, *rest = chain._chain_forward(text, [0.1] * count, [1e-5] * count, x, given, *tensors)
    if problem.backward:
        _rehearse_backward(text, problem, x, result, mask, rest, tensors)


def _rehearse_backward(
    text: str, problem: ChainProblem, x: Tensor, dout: Tensor, mask: Tensor, rest: list[Tensor], tensors: Any
) -> None:
    weights, gammas, betas = (tensors[field :: len(chain.FIELDS)] for field in range(3))
    needs = [not problem.convs[0].is_stem, problem.residual == "given"]
    for weight in weights:
        needs += [weight is not None] * 3
    chain._chain_backward(text, needs, dout, x, mask, *weights, *gammas, *betas, *rest)
