"""One way to launch a kernel, and a record of what was launched.

Every launcher goes through :func:`launch`. On tensors of the ``meta`` device nothing runs and the record alone is
kept: that is how ``explain`` counts a step for a GPU that is not there, with the launchers' own arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from ..plan.config import GemmConfig, PassConfig
from . import dependent

Config = GemmConfig | PassConfig


class Launch(NamedTuple):
    """One kernel that ran: its name, its FLOPs, the bytes it reads and writes (each once), its configuration."""

    kernel: str
    flops: int
    bytes: int
    config: dict[str, Any]


class Rehearsed(NamedTuple):
    """A kernel that would run: the jitted function, how it would be launched, and what the record holds of it."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]
    entry: Launch


OnKernel = Callable[[Rehearsed], object]


OnLaunch = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any], Any], None]
"""Is told of a launch that happened: function, grid, arguments by name, options, and what launching it returned."""


class _Rehearsal(threading.local):
    launches: list[Launch] | None = None
    on_kernel: OnKernel | None = None


class _Listener(threading.local):
    on_launch: OnLaunch | None = None


class Watch(Protocol):
    """Is told of every launch that really happens: before it, and after it was queued."""

    def begin(self, kernel: str, config: Config) -> None: ...

    def end(self) -> None: ...


_lock = threading.Lock()
_watches: list[Watch] = []
_recorders: list[list[Launch]] = []
_rehearsal = _Rehearsal()
_listener = _Listener()


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Yields a list that grows by one :class:`Launch` per kernel, the vendor's convolutions included.

    Process-wide: the backward pass runs in threads of its own.
    """
    launches: list[Launch] = []
    with _lock:
        _recorders.append(launches)
    try:
        yield launches
    finally:
        with _lock:
            _recorders[:] = [recorder for recorder in _recorders if recorder is not launches]


@contextmanager
def rehearse_launches(on_kernel: OnKernel | None = None) -> Iterator[list[Launch]]:
    """Like :func:`record_launches`, for what this thread does on ``meta`` tensors; no other record sees any of it."""
    launches: list[Launch] = []
    before = _rehearsal.launches, _rehearsal.on_kernel
    _rehearsal.launches, _rehearsal.on_kernel = launches, on_kernel
    try:
        yield launches
    finally:
        _rehearsal.launches, _rehearsal.on_kernel = before


@contextmanager
def watch_launches(watch: Watch) -> Iterator[None]:
    """``watch`` sees what is launched inside, by whichever thread."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def is_watched() -> bool:
    """Whether a record is open, or somebody watches launches."""
    return bool(_recorders or _watches or _rehearsal.launches is not None)


def tell_of_launches(on_launch: OnLaunch | None) -> OnLaunch | None:
    """Has ``on_launch`` told of this thread's launches, of all that really happen; returns who was told before."""
    before, _listener.on_launch = _listener.on_launch, on_launch
    return before


def nbytes(touched: Iterable[torch.Tensor | int | None]) -> int:
    """Bytes of tensors (whole) and of plain byte counts; ``None`` counts nothing."""
    total = 0
    for item in touched:
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif item is not None:
            total += item
    return total


def note(
    kernel: str, flops: int, touched: Iterable[torch.Tensor | int | None], config: Config | dict[str, Any]
) -> None:
    """Adds one entry to every open record. Costs nothing when none is open."""
    if not _recorders and _rehearsal.launches is None:
        return
    entry = Launch(kernel, flops, nbytes(touched), config if isinstance(config, dict) else config.to_dict())
    if _rehearsal.launches is not None:
        _rehearsal.launches.append(entry)
        return
    with _lock:
        for recorder in _recorders:
            recorder.append(entry)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    touched: Iterable[torch.Tensor | int | None],
    flops: int,
    config: Config,
    device: torch.device,
    **arguments: Any,
) -> None:
    """Launches ``kernel`` once over ``grid`` on ``device``'s current stream.

    ``touched`` are the tensors (or bytes) that it reads or writes, for the record. ``arguments`` are the kernel's own,
    by keyword, tile sizes included; warps, stages and the register cap come from ``config``.
    """
    note(kernel.fn.__name__, flops, touched, config)
    if 0 in grid:
        return
    options = config.options
    if dependent.is_known_to(kernel):
        arguments["DEPENDENT"] = depends = dependent.is_wanted(device)
        options = {**options, "launch_pdl": True} if depends else options
    if device.type == "meta":
        if _rehearsal.on_kernel is not None:
            assert _rehearsal.launches is not None
            _rehearsal.on_kernel(Rehearsed(kernel, arguments, dict(options), grid, _rehearsal.launches[-1]))
        return
    for watch in _watches:
        watch.begin(kernel.fn.__name__, config)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    # Who is told of a launch sees nothing of the operators of PyTorch's that it takes.
    unseen = nullcontext() if _listener.on_launch is None else torch._C._DisableTorchDispatch()
    with torch.cuda.device(device) if elsewhere else nullcontext(), unseen:
        made = kernel[grid](**arguments, **options)
    for watch in _watches:
        watch.end()
    if _listener.on_launch is not None:
        _listener.on_launch(kernel, grid, arguments, options, made)
