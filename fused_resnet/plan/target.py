"""Frozen description of the processor that the kernels run on. The only place that asks a device, lazily."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

MIN_SM = 80
"""Ampere: the first with bfloat16 tensor cores and asynchronous copies."""
GPU_DTYPES = frozenset({"bfloat16", "float16", "float32"})
INTERPRETER_DTYPES = frozenset({"float16", "float32", "float64"})
TOO_LATE = (
    "TRITON_INTERPRET=1 was set after Triton had been imported, so the kernels were built for a GPU and the "
    "interpreter cannot run them. Set it before Python starts (TRITON_INTERPRET=1 python ...), or before the first "
    "import of triton, fused_resnet, torchvision or timm; or unset it to take the reference route."
)


@dataclass(frozen=True)
class Target:
    """What the planner knows of a processor.

    ``shared_memory`` is what one block may ask for, in bytes. ``bandwidth`` (bytes/s, of a copy) and ``matrix_rate``
    (FLOP/s, dense 16-bit, float32 accumulation) are sustained figures, not those of a data sheet.
    """

    name: str
    sm: int
    """Compute capability, as 10 * major + minor; 0 for the interpreter."""
    sm_count: int
    shared_memory: int
    l2_bytes: int
    bandwidth: float
    matrix_rate: float
    dtypes: frozenset[str] = GPU_DTYPES
    interpreter: bool = False

    @property
    def has_group_products(self) -> bool:
        """Whether products take both operands from shared memory: Hopper and its server kin. Elsewhere, on the cards
        after it (sm_120) too, operands and products share a thread's registers, and tiles are smaller."""
        return 90 <= self.sm < 120

    def why_not_dtype(self, dtype: str) -> str | None:
        """Why the kernels do not take activations of ``dtype`` here, or None where they do."""
        if dtype in self.dtypes:
            return None
        if self.interpreter and dtype == "bfloat16":
            return "Triton's interpreter has no bfloat16 arithmetic"
        if dtype == "float64":
            return "float64 runs in Triton's interpreter only"
        return f"the kernels take {', '.join(sorted(self.dtypes))}, not {dtype}"


# Sustained rates: a large device-to-device copy and a large 16-bit cuBLAS product. Of the data sheets' 3.35, 4.8 and
# 2.04 TB/s and 989, 989 and 312 TFLOP/s (SXM boards; A100 with 80 GB), power limits leave about this much.
H100 = Target("h100", 90, 132, 232_448, 50 << 20, 3.0e12, 750e12)
H200 = Target("h200", 90, 132, 232_448, 60 << 20, 4.3e12, 770e12)
A100 = Target("a100", 80, 108, 166_912, 40 << 20, 1.75e12, 260e12)
PRESETS = (H100, H200, A100)

INTERPRETER = Target("interpreter", 0, 1, 232_448, 1 << 20, 1e10, 1e11, INTERPRETER_DTYPES, interpreter=True)
"""Triton's interpreter: the rates are placeholders, since nothing is timed there."""


def preset(name: str) -> Target:
    """The described GPU of that name: "h100", "h200" or "a100" (SXM). KeyError names those that there are."""
    for target in PRESETS:
        if target.name == name.lower():
            return target
    raise KeyError(f"no target is called {name!r}; there are {', '.join(target.name for target in PRESETS)}")


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was there before Triton was imported.

    RuntimeError where the variable came too late to be of use.
    """
    if not isinstance(tl.sum, triton.JITFunction):
        return True
    if triton.knobs.runtime.interpret:
        raise RuntimeError(TOO_LATE)
    return False


def interprets(device: torch.device) -> bool:
    """Whether kernels on ``device``'s tensors run in the interpreter, where a tile costs time and not its elements."""
    return device.type == "cpu" and interpreted()


class Assumption(NamedTuple):
    """A target to plan for, present or not; None with the reason why there is none."""

    target: Target | None
    reason: str | None = None


class _Assumed(threading.local):
    current: Assumption | None = None


_assumed = _Assumed()


@contextmanager
def assume(assumption: Assumption) -> Iterator[None]:
    """Plans made inside, on this thread, are for ``assumption`` whatever the device. For ``explain``."""
    before = _assumed.current
    _assumed.current = assumption
    try:
        yield
    finally:
        _assumed.current = before


def assumption() -> Assumption | None:
    """What :func:`assume` says on this thread."""
    return _assumed.current


def current(device: torch.device) -> Target | None:
    """What the kernels would run on for tensors of ``device``; None where they cannot (:func:`why_not` says why).

    RuntimeError if TRITON_INTERPRET was set too late.
    """
    if _assumed.current is not None:
        return _assumed.current.target
    known = _gpus.get(device.index) if device.type == "cuda" and device.index is not None else None
    if known is not None and known.sm >= MIN_SM:
        return known  # asked before, and every question below costs the host as much as a launch
    if interpreted():
        return INTERPRETER if device.type in ("cpu", "cuda") else None
    if why_not(device) is not None:
        return None
    _ask(_index(device))
    return _gpus[_index(device)]


@torch.compiler.assume_constant_result
def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, or None where they can."""
    if _assumed.current is not None:
        return _assumed.current.reason
    if device.type == "cpu":
        return None if interpreted() else "the kernels need a GPU, and the tensors are on the CPU"
    if device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, and the tensors are on {device.type!r}"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs, and this PyTorch was built for ROCm"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    _ask(_index(device))
    target = _gpus[_index(device)]
    if target.sm < MIN_SM:
        major, minor = divmod(target.sm, 10)
        return f"the kernels need compute capability 8.0 (Ampere) or later, and {target.name} has {major}.{minor}"
    return None


_gpus: dict[int, Target] = {}
"""By device index, filled by :func:`_ask` alone."""


@torch.compiler.assume_constant_result
def _ask(index: int) -> None:
    """Describes the GPU of that index, once per process. A call of its own: tracing sees the filled table, no query."""
    if index not in _gpus:
        _gpus[index] = from_properties(torch.cuda.get_device_properties(index))


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def from_properties(properties: object) -> Target:
    """A target from what ``torch.cuda.get_device_properties`` returns.

    A board that a preset describes takes the preset's sustained rates; any other gets an estimate from its clocks.
    """

    def read(name: str, default: int) -> int:
        return int(getattr(properties, name, 0) or default)

    name = str(getattr(properties, "name", "gpu"))
    sm = 10 * read("major", 0) + read("minor", 0)
    sm_count = read("multi_processor_count", 1)
    for known in PRESETS:
        if known.name in name.lower() and (known.sm, known.sm_count) == (sm, sm_count):
            bandwidth, matrix_rate = known.bandwidth, known.matrix_rate
            break
    else:
        # Clocks are in kHz and the bus in bits; memory moves two words a cycle. Nine tenths and three quarters of
        # the peaks are what copies and products usually sustain.
        bandwidth = 0.9 * 2 * read("memory_clock_rate", 1_000_000) * 1e3 * read("memory_bus_width", 256) / 8
        matrix_rate = 0.75 * sm_count * read("clock_rate", 1_500_000) * 1e3 * _flops_per_cycle(sm)
    return Target(
        name,
        sm,
        sm_count,
        read("shared_memory_per_block_optin", 101_376 if sm % 10 or sm >= 120 else 166_912),
        read("L2_cache_size", 4 << 20),
        bandwidth,
        matrix_rate,
    )


def _flops_per_cycle(sm: int) -> int:
    """Dense 16-bit tensor-core FLOPs of one multiprocessor in one cycle."""
    return {80: 2048, 90: 4096, 100: 8192, 103: 8192}.get(sm, 1024)
