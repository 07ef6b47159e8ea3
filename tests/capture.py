"""What the launchers pass to Triton, caught on ``meta`` tensors instead of launched."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import fused_resnet.launch
from fused_resnet.launch import record
from fused_resnet.plan import tables
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.target import Target

MOST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Descriptor:
    """What is compiled of a tensor descriptor: its sizes are read when the kernel runs."""

    dtype: torch.dtype
    block: list[int]

    def made(self) -> TensorDescriptor:
        """One of a tensor that is a single block."""
        base = torch.empty(self.block, dtype=self.dtype, device="meta")
        return TensorDescriptor.from_tensor(base, self.block)


@dataclass(frozen=True)
class Call:
    """One launch: the kernel, its arguments (tensors as dtypes), the compiler's options, and what it was part of."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]
    constants: frozenset[str]
    where: str
    measured: bool
    """Whether its tile was the fastest of those that were measured on this GPU, for some layer."""

    def key(self, exact: bool = True) -> tuple[Any, ...]:
        """What distinguishes two compilations. ``exact`` also tells apart the integers that Triton specialises on."""
        described = tuple(
            (name, value if name in self.constants else _specialisation(value, exact)) for name, value in self.arguments
        )
        return (self.kernel, str(described), self.options)

    def value(self, name: str) -> Any:
        return dict(self.arguments).get(name)

    @property
    def is_gemm(self) -> bool:
        return self.value("BLOCK_K") is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: the first tensor of a GEMM."""
        values = (item for _, value in self.arguments for item in (value if isinstance(value, tuple) else (value,)))
        first = next(value for value in values if isinstance(value, torch.dtype | Descriptor))
        return first.dtype if isinstance(first, Descriptor) else first


def _described(value: Any) -> Any:
    """Tensors as their dtypes, in tuples too."""
    if isinstance(value, TensorDescriptor):
        return Descriptor(value.base.dtype, value.block_shape)
    if isinstance(value, tuple):
        return type(value)(*map(_described, value))
    return value.dtype if isinstance(value, torch.Tensor) else value


def _specialisation(value: Any, exact: bool) -> str:
    if isinstance(value, tuple):
        return ", ".join(_specialisation(item, exact) for item in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value) if isinstance(value, torch.dtype | Descriptor) or value is None else type(value).__name__
    width = "i32" if -MOST_INT32 <= value <= MOST_INT32 else "i64"
    if not exact:
        return width
    return "1" if value == 1 else width + ("/16" if value % 16 == 0 else "")


class Capture:
    """Stands in for ``record.launch`` in every launcher."""

    def __init__(self, target: Target) -> None:
        self.calls: dict[tuple[Any, ...], Call] = {}
        self.where = ""
        table = tables.TABLES.get(tables.gpu_slug(target.name), {})
        self.measured = {entry.ours for passes in table.values() for entry in passes.values()}

    def __call__(
        self, kernel: Any, grid: Any, *, touched: Any, flops: int, config: Any, device: Any, **arguments: Any
    ) -> None:
        options = {"num_warps": config.num_warps}
        if isinstance(config, GemmConfig):
            options["num_stages"] = config.num_stages
            if config.maxnreg is not None:
                options["maxnreg"] = config.maxnreg
        call = Call(
            kernel.fn.__module__,
            kernel.fn.__name__,
            tuple((n, _described(v)) for n, v in arguments.items()),
            tuple(sorted(options.items())),
            frozenset(p.name for p in kernel.params if p.is_constexpr),
            self.where,
            config in self.measured,
        )
        self.calls.setdefault(call.key(), call)

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        modules = [
            importlib.import_module(info.name)
            for info in pkgutil.iter_modules(fused_resnet.launch.__path__, "fused_resnet.launch.")
        ]
        users = [module for module in modules if getattr(module, "launch", None) is record.launch]
        for module in users:
            module.launch = self  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in users:
                module.launch = record.launch  # type: ignore[attr-defined]
