"""Chains of conv -> BN -> ReLU made of nn modules: run eagerly, and through the fused operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import functional
from fused_resnet.plan import planner, tables
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.plans import Choice, Plan, decode

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
VENDOR = Choice("vendor", "a test")


def pair(ci: int, co: int, kernel: int | tuple[int, int] = 1, *, training: bool = True, **options: Any) -> Pair:
    """A float64 conv without bias and a BN whose every number is drawn; BN's keywords are ``eps`` and so on."""
    bn_names = ("eps", "momentum", "affine", "track_running_stats")
    bn_options = {name: options.pop(name) for name in bn_names if name in options}
    conv = nn.Conv2d(ci, co, kernel, bias=False, **options).double()
    return conv, norm(co, training=training, **bn_options)


def norm(channels: int, *, training: bool = True, kind: type[nn.BatchNorm2d] = nn.BatchNorm2d, **options: Any) -> Any:
    bn = kind(channels, **options).double()
    for t, base in ((bn.weight, 1.0), (bn.bias, 0.0), (bn.running_mean, 0.0)):
        if t is not None:
            t.data.copy_(base + 0.3 * torch.randn(channels))
    if bn.running_var is not None:
        bn.running_var.copy_(0.5 + torch.rand(channels))
    return bn.train(training)


@dataclass
class Chain:
    """Pairs, and what joins before the last ReLU: "none", "identity", "given" or "projection"."""

    x: Tensor
    pairs: Sequence[Pair]
    kind: str = "none"
    projection: Pair | None = None
    residual: Tensor | None = None
    relu: bool = True
    route: str = "staged"
    dout: Tensor | None = field(default=None)

    @property
    def modules(self) -> list[nn.Module]:
        return [m for p in (*self.pairs, *([self.projection] if self.projection else [])) for m in p]

    def copied(self) -> Chain:
        """The same numbers in tensors of their own; who requires a gradient does so there too."""

        def fresh(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().clone().requires_grad_(t.requires_grad)

        pairs, projection = copy.deepcopy((self.pairs, self.projection))
        return replace(self, x=fresh(self.x), pairs=pairs, projection=projection, residual=fresh(self.residual))

    def eager(self) -> Tensor:
        a = self.x
        for i, (conv, bn) in enumerate(self.pairs):
            a = bn(conv(a))
            if i < len(self.pairs) - 1:
                a = a.relu()
        if self.projection is not None:
            a = a + self.projection[1](self.projection[0](self.x))
        elif self.kind == "identity":
            a = a + self.x
        elif self.kind == "given":
            a = a + self.residual
        return a.relu() if self.relu else a

    def fused(self) -> Tensor:
        def layer(p: Pair) -> tuple[functional.Conv, functional.BatchNorm]:
            return functional.conv_of(p[0]), functional.batch_norm_of(p[1])

        return functional.conv_bn_chain(
            self.x,
            [layer(p) for p in self.pairs],
            layer(self.projection) if self.projection else None,
            residual=self.residual,
            identity=self.kind == "identity",
            relu=self.relu,
            route=self.route,
        )

    def state(self) -> dict[str, Tensor]:
        """Gradients, running statistics and counters, by name."""
        found = {f"{i}.{k}": v for i, m in enumerate(self.modules) for k, v in m.named_buffers()}
        found |= {f"{i}.d{k}": p.grad for i, m in enumerate(self.modules) for k, p in m.named_parameters()}
        return found | {"dx": self.x.grad, "dresidual": None if self.residual is None else self.residual.grad}


def agree(a: dict[str, Tensor | None], b: dict[str, Tensor | None], **tolerance: Any) -> None:
    """The same names with the same values; None only beside None."""
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] is None) == (value is None), f"{name}: {a[name]} and {value}"
        if value is not None:
            torch.testing.assert_close(a[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def compare(case: Chain, backward: bool = True) -> tuple[Chain, Chain]:
    """Output, gradients, running statistics and counters of the fused operation against eager's, in float64."""
    ours, theirs = case.copied(), case.copied()
    outs = ours.fused(), theirs.eager()
    torch.testing.assert_close(*outs)
    if backward and outs[1].requires_grad:
        dout = torch.randn_like(outs[1]) if case.dout is None else case.dout
        for out in outs:
            out.backward(dout)
    agree(ours.state(), theirs.state())
    return ours, theirs


Choose = Callable[[int, str], bool]
"""(conv, pass) -> whether the vendor runs it; the projection is conv -1."""


def mixed(text: str, vendor: Choose) -> str:
    """The encoded plan with the passes that ``vendor`` names given to the vendor's convolution."""
    plan = decode(text)

    def edit(i: int, conv: Any) -> Any:
        return replace(conv, **{kind: VENDOR for kind in ("fprop", "dgrad", "wgrad") if vendor(i, kind)})

    projection = edit(-1, plan.projection) if plan.projection else None
    edited: Plan = replace(plan, convs=tuple(edit(i, c) for i, c in enumerate(plan.convs)), projection=projection)
    return edited.encode()


def formed(text: str) -> str:
    """The encoded plan with passes of their own for dy of every 1x1, and for the Gram route's dz."""
    plan = decode(text)

    def edit(conv: Any) -> Any:
        return replace(conv, forms_dy=conv.problem.is_pointwise)

    return replace(
        plan,
        convs=tuple(edit(conv) for conv in plan.convs),
        projection=edit(plan.projection) if plan.projection else None,
        gram=replace(plan.gram, masked_wgrad=None) if plan.gram else None,
    ).encode()


def paired(text: str) -> str:
    """The encoded plan whose first convolution has both gradients by one kernel, where that can be."""
    plan = decode(text)
    if not plan.convs or not plan.convs[0].problem.is_gemm:
        return text
    first = replace(plan.convs[0], pair=GemmConfig(16, 16, 64, num_warps=4, split=3))
    return replace(plan, convs=(first, *plan.convs[1:])).encode()


def mixing(vendor: Choose) -> AbstractContextManager[None]:
    """Plans made inside mix the vendor's passes and ours, as they do on a GPU."""
    return editing(lambda text: mixed(text, vendor))


def projects_staged(text: str) -> str:
    """The encoded plan with a projection that writes its output beside a last convolution that does not."""
    plan = decode(text)
    return text if plan.gram is None else replace(plan, gram=replace(plan.gram, projection=None)).encode()


def stores_a(text: str) -> str:
    """The encoded plan whose Gram kernel writes its input as it formed it, or one that does not."""
    plan = decode(text)
    return (
        text if plan.gram is None else replace(plan, gram=replace(plan.gram, stores_a=not plan.gram.stores_a)).encode()
    )


def masks_on_load(text: str) -> str:
    """The encoded plan whose readers of dz form it, where they can."""
    plan = decode(text)
    return text if plan.gram is None else replace(plan, gram=replace(plan.gram, stores_dz=False)).encode()


@contextmanager
def editing(edit: Callable[[str], str]) -> Iterator[None]:
    """Plans made inside are edited: they take what a GPU's measurements may choose."""
    original = planner.chain_plan_text

    def chain_plan_text(*args: Any, **options: Any) -> tuple[str, str, str]:
        text, route, reason = original(*args, **options)
        return (edit(text) if text else text), route, reason

    planner.chain_plan_text = chain_plan_text
    tables.forget_plans()
    try:
        yield
    finally:
        planner.chain_plan_text = original
        tables.forget_plans()
