"""An operator's launches, written down once and then replayed: what the host does for a step it has done before.

An operator's body is Python that checks, plans, allocates and launches, and all it does follows from its arguments'
metadata. So the second call of a kind writes down, in order, PyTorch's operators that ran (memory, views, the vendor's
convolutions) and our launches, and later calls run that list as one straight function: no checks, no dictionaries, and
each kernel as Triton compiled it, without asking Triton again which one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from ..alike import Kinds, are_plain
from . import dependent, record
from .check import allows_tf32

Tensor = torch.Tensor
Body = Callable[..., tuple[Tensor, ...]]


class _Kind:
    """What is known of calls of one kind. The second writes: of a job of ever new sizes there is none."""

    sequence: Body | None = None
    is_writable = True


def replaying(body: Body) -> Body:
    """``body`` that writes down what it does, and replays it for arguments of the same kind.

    ``body`` takes tensors, None, hashable values and lists of them, and returns new tensors; which operators it calls
    and kernels it launches follows from the values and the tensors' metadata. Whoever watches launches sees ``body``
    itself; ``otherwise``, if given, runs in place of ``body`` for tensors with their own say in what operators do.
    """
    kinds: Kinds[_Kind] = Kinds(aligned=True)
    _all_kinds.append(kinds)

    def call(*arguments: Any, otherwise: Body = body) -> tuple[Tensor, ...]:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        values = [Tensor if isinstance(a, Tensor) else tuple(a) if type(a) is list else a for a in arguments]
        # Switches that launchers read, and by which the vendor's convolutions choose the layout of what they return.
        key = *values, allows_tf32(), torch._C._get_cudnn_enabled(), dependent.is_on()
        kind = kinds.find(key, tensors)
        if kind is None:
            if otherwise is not body and not (are_plain(tensors) and all(map(_is_carried_out, tensors))):
                return otherwise(*arguments)
            kinds.remember(key, tensors, _Kind())
            return body(*arguments)
        if not kind.is_writable or record.is_watched():
            return body(*arguments)
        if kind.sequence is None:
            with _Writer(tensors) as writer:
                results = body(*arguments)
            kind.sequence = writer.sequence(results)
            kind.is_writable = kind.sequence is not None
            return results
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return kind.sequence(*tensors)
        return kind.sequence(*tensors)

    return call


def _is_carried_out(t: Tensor) -> bool:
    """Whether ``t`` is what its memory holds: gradients of complex numbers are negated lazily, say."""
    return not (t.is_neg() or t._is_zerotensor())


_all_kinds: list[Kinds[_Kind]] = []


def forget() -> None:
    """All sequences: the next calls write them anew."""
    for kinds in _all_kinds:
        kinds.clear()


class _Line(NamedTuple):
    text: str
    reads: set[str]
    results: tuple[str, ...]
    is_pure: bool
    """It does nothing but make its results."""


class _Unknown(Exception):
    """A tensor that is neither an argument nor made of them."""


_aten = torch.ops.aten
_BOUND: dict[Any, Any] = {_aten.convolution.default: torch.convolution, _aten.permute.default: torch.permute}
"""The same by another way in, which costs the host half as much."""
_MEMORY = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default)


_UNWRITABLE = ("_c10d_functional", "c10d")
"""Who takes part in a collective operation, and how many they are, is asked each time."""


class _Writer(TorchDispatchMode):
    """Writes what runs inside as the lines of a function."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[_Line] | None = []
        self.constants: dict[str, Any] = {
            "torch": torch,
            "empty_strided": torch.empty_strided,
            "TensorDescriptor": TensorDescriptor,
        }
        self.names = WeakTensorKeyDictionary()  # of tensors; the memory is freed as it would be
        self.numbers = count()
        self.parameters = [self.define(t) for t in arguments]

    def __enter__(self) -> _Writer:
        self.before = record.tell_of_launches(self.launched)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        record.tell_of_launches(self.before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        reads_data = not isinstance(results, (Tensor, tuple, list))  # and gives a number, which may be another one
        if reads_data or func.namespace in _UNWRITABLE:
            self.lines = None
        elif func in _MEMORY:
            size, stride = tuple(results.shape), results.stride()
            text = f"empty_strided({size}, {stride}, dtype={results.dtype}, device={self.constant(results.device)})"
            if not results.numel():
                text = self.constant(results)  # nothing can be written there
            self.write(lambda _: text, results, is_pure=True)
        elif func is _aten.slice.Tensor and args[1:] and args[1] == 0:
            rows = slice(*args[2:])
            text = f"[{rows.start}:{rows.stop}:{rows.step or 1}]"
            self.write(lambda value: value(args[0]) + text, results, is_pure=True)
        else:
            called, is_pure = self.constant(_BOUND.get(func, func)), not func._schema.is_mutable
            self.write(lambda value: f"{called}({_listed(value, args, kwargs)})", results, is_pure=is_pure)
        return results

    def launched(self, kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any], made: Any) -> None:
        """Of a launch that was queued; ``made`` is what launching returned."""
        values = [arguments[name] for name in kernel.arg_names]
        if isinstance(made, CompiledKernel):
            run = self.constant(made[(*grid, 1, 1)[:3]])
            self.write(lambda value: f"{run}({_listed(value, values)})")
        else:
            self.write(lambda value: f"{self.constant(kernel)}[{grid}]({_listed(value, values, options)})")

    def write(self, call: Callable[[Callable[[Any], str]], str], results: Any = (), *, is_pure: bool = False) -> None:
        """Adds a line; ``call`` makes its text of what puts a value into words."""
        if self.lines is None:
            return
        reads: set[str] = set()
        try:
            text = call(lambda value: self.value(value, reads))
        except _Unknown:
            self.lines = None
            return
        if isinstance(results, Tensor):
            names: tuple[str, ...] = (self.define(results),)
            text = f"{names[0]} = {text}"
        elif names := tuple("_" if t is None else self.define(t) for t in results):
            text = f"{', '.join(names)}, = {text}"
        self.lines.append(_Line(text, reads, names, is_pure))

    def sequence(self, results: Sequence[Tensor]) -> Body | None:
        """The function of the arguments' tensors that does what was written; None if that cannot be told."""
        if self.lines is None or any(t not in self.names for t in results):
            return None
        returned = [self.names[t] for t in results]
        needed, body = {*returned, *self.parameters}, [f"    return ({''.join(f'{name}, ' for name in returned)})"]
        for line in reversed(self.lines):
            if line.is_pure and needed.isdisjoint(line.results):
                continue  # nobody reads or writes them
            if dead := sorted((line.reads | {*line.results}) - needed):
                body.append(f"    del {', '.join(dead)}")
            needed |= line.reads
            body.append(f"    {line.text}")
        source = "\n".join([f"def sequence({', '.join(self.parameters)}):", *reversed(body)])
        namespace = dict(self.constants)
        exec(compile(source, "<replayed launches>", "exec"), namespace)
        return namespace["sequence"]  # type: ignore[no-any-return]

    # ----- words -----

    def define(self, t: Tensor) -> str:
        if t not in self.names:
            self.names[t] = f"t{next(self.numbers)}"
        return self.names[t]  # type: ignore[no-any-return]

    def constant(self, value: Any) -> str:
        name = f"c{next(self.numbers)}"
        self.constants[name] = value
        return name

    def value(self, value: Any, reads: set[str]) -> str:
        if isinstance(value, Tensor):
            if value not in self.names:
                raise _Unknown
            reads.add(self.names[value])
            return self.names[value]  # type: ignore[no-any-return]
        if hasattr(value, "_fields"):
            return f"{self.constant(type(value))}({_listed(lambda field: self.value(field, reads), value)})"
        if isinstance(value, (list, tuple)):
            return f"({''.join(self.value(each, reads) + ', ' for each in value)})"
        if isinstance(value, TensorDescriptor):
            parts = (value.base, value.shape, value.strides, value.block_shape)
            return f"TensorDescriptor({_listed(lambda part: self.value(part, reads), parts)})"
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        return self.constant(value)


def _listed(value: Callable[[Any], str], values: Sequence[Any], options: dict[str, Any] | None = None) -> str:
    return ", ".join([*map(value, values), *(f"{name}={value(option)}" for name, option in (options or {}).items())])
