"""A step of a model rehearsed on tensors without data: which operator ran, on whose behalf, and what it cost.

The model is copied with its parameters and buffers replaced by fake ones, so that nothing of it is touched; then the
copy runs as the model would, forward and backward, and the operators that PyTorch dispatches are counted. Ours are
opaque to the dispatcher: their calls are kept, and their own code runs afterwards on ``meta`` tensors, where a launch
is only recorded.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .families.children import passive
from .launch.record import Launch, OnKernel, rehearse_launches
from .plan.cost import Cost, eager_costs
from .plan.plans import Plan, decode

AUTOCAST = (torch.bfloat16, torch.float16)
LOSS = "loss"
"""Owner of the loss's share."""
_NO_NUMBER = 1 << 63
"""From here on: the nodes that only accumulate a parameter's gradient."""
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Share:
    """What one module (or the loss) did: its operators' costs, our launches, and what was saved for backward."""

    costs: list[Cost] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    plans: list[Plan | None] = field(default_factory=list)
    saved_bytes: int = 0


def rehearse(
    model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, training: bool, on_kernel: OnKernel | None = None
) -> dict[str, Share]:
    """Runs one step of a copy of ``model`` without data: what each module did, by qualified name, and LOSS.

    ``inputs`` give shapes, strides and dtypes alone. ``dtype`` is autocast's where it is a 16-bit one. ``training``:
    with a backward pass, from a cross-entropy if the output looks like class scores. ``on_kernel`` is told of every
    kernel of ours that would run.
    """
    stage = _Stage()
    fake_mode = FakeTensorMode()
    with fake_mode:
        actors = _without_data(model)
        fakes = tuple(_fake(t) for t in inputs)
    known = [*actors.parameters(), *actors.buffers(), *fakes]
    saving = torch.autograd.graph.saved_tensors_hooks(stage.keeper(known), lambda t: t)
    autocast = torch.autocast("cpu", dtype, enabled=dtype in AUTOCAST)
    with fake_mode, stage, _normalising_alone(), saving if training else nullcontext():
        with stage.following(actors), torch.set_grad_enabled(training), autocast:
            out = actors(*fakes)
            with stage.as_owner(LOSS):
                result = _loss(out) if training else None
        if result is not None:
            with stage.as_owner(LOSS):
                result.backward()
    stage.perform(on_kernel)
    return stage.shares


def _fake(t: Tensor) -> Tensor:
    """An empty tensor like ``t``: shape, strides and dtype. Called inside a fake mode."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")


def _without_data(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares no tensor with it and calls none of its hooks (but shows that it has them)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in (*vars(module).items(), *module._parameters.items(), *module._buffers.items()):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(_fake(value), requires_grad=value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = _fake(value)
            elif name in _HOOKS:
                memo[id(value)] = OrderedDict((key, _silent) for key in value)
            elif type(value).__name__ == "ProcessGroup":
                memo[id(value)] = value
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        # A cumulative average divides by a counter that has no data here; it costs what any other momentum does.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            module.momentum = 0.1
    return copied


@contextmanager
def _normalising_alone() -> Iterator[None]:
    """A SyncBatchNorm that is called on fake tensors is a BatchNorm: there is nothing to tell other processes."""
    original = nn.SyncBatchNorm.forward

    def forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x) if isinstance(x, FakeTensor) else original(self, x)  # type: ignore[arg-type]

    nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = original  # type: ignore[method-assign]


def _silent(*_arguments: Any, **_keywords: Any) -> None:
    """Stands in for a user's hook."""


def _loss(out: Any) -> Tensor | None:
    """Cross-entropy where the output looks like class scores; the sum of every output where it does not."""
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else (out,)
    outputs = [t for t in values if isinstance(t, Tensor) and t.requires_grad]
    if len(outputs) == 1 and outputs[0].dim() >= 2:
        n, _, *pixels = outputs[0].shape
        labels = torch.empty((n, *pixels), dtype=torch.int64, device=outputs[0].device)
        return nn.functional.cross_entropy(outputs[0], labels)
    return torch.stack([t.float().sum() for t in outputs]).sum() if outputs else None


class _Stage(TorchDispatchMode):
    """Sees every dispatched operator and knows whose it is.

    Forward, the innermost module that is running. Backward, the one whose forward made the autograd node that is
    running: nodes are numbered as they are made, so a module's are an interval.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[str, Share] = {}
        self._names, self._latest = [""], ""
        self._starts, self._owners = [torch.autograd._get_sequence_nr()], [""]  # type: ignore[attr-defined]
        self._calls: list[tuple[Share, Any, tuple[Any, ...], dict[str, Any]]] = []
        self._kept: dict[int, Any] = {}

    def share(self, name: str) -> Share:
        return self.shares.setdefault(name, Share())

    # Whose it is

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Work done inside belongs to the innermost module of ``model`` that is running.

        By global hooks: a block whose children carry hooks of their own would run differently.
        """
        names = {module: name for name, module in model.named_modules()}

        @passive
        def enter(module: nn.Module, _arguments: Any) -> None:
            if module in names:
                self._enter(names[module])

        @passive
        def leave(module: nn.Module, _arguments: Any, _result: Any) -> None:
            if module in names:
                self._leave()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def as_owner(self, name: str) -> Iterator[None]:
        self._enter(name)
        yield
        self._leave()

    def _enter(self, name: str) -> None:
        self._names.append(name)
        self._mark()

    def _leave(self) -> None:
        self._names.pop()
        self._mark()

    def _mark(self) -> None:
        self._starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._owners.append(self._names[-1])

    def _owner(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._names[-1]
        number = node._sequence_nr()
        if self._starts[0] <= number < _NO_NUMBER:
            self._latest = self._owners[bisect_right(self._starts, number) - 1]
        return self._latest

    # What it is

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "fused_resnet":
            self._calls.append((self.share(self._owner()), func, *tree_map(_described, (args, kwargs))))
        elif func.namespace == "aten":
            costs = eager_costs(func, args, kwargs, out)
            if costs:
                self.share(self._owner()).costs += costs
        return out

    def keeper(self, known: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """Counts a tensor saved for backward, once per storage; ``known`` are there anyway."""
        for t in known:
            storage = t.untyped_storage()
            self._kept[storage._cdata] = storage

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in self._kept:
                self._kept[storage._cdata] = storage
                self.share(self._owner()).saved_bytes += storage.nbytes()
            return t

        return keep

    def perform(self, on_kernel: OnKernel | None) -> None:
        """Runs our operators' own code on meta tensors, under a record of launches."""
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        for share, func, args, kwargs in self._calls:
            args, kwargs = tree_map(
                lambda value: value.build() if isinstance(value, _Described) else value, (args, kwargs)
            )
            with rehearse_launches(on_kernel) as launches, torch.no_grad():
                func.redispatch(keys, *args, **kwargs)
            share.launches += launches
            share.plans.append(decode(args[0]) if args and isinstance(args[0], str) else None)
        self._calls.clear()


@dataclass(frozen=True)
class _Described:
    """A tensor's shape, strides and dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def build(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def _described(value: Any) -> Any:
    return _Described(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value
