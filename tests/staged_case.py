"""The staged route as the tests run it: whole chains through the launchers, with small tiles, in any dtype.

The planner gives the interpreter one large tile; here every tensor spans several tiles, none of them full.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.autograd import layer as layer_module
from fused_resnet.autograd import staged_backward, staged_forward
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.plans import ChainProblem, Choice, ConvPlan, Plan
from fused_resnet.plan.problem import ConvProblem
from tests import numerics

SMALL_TILES = {
    "fprop": GemmConfig(32, 16, 16, num_warps=4),
    "dgrad": GemmConfig(32, 16, 16, num_warps=4),
    "wgrad": GemmConfig(16, 16, 32, num_warps=4, split=3),
}

_BOX = GemmConfig(16, 16, 16, num_warps=4, form="box")
_WALK = GemmConfig(16, 32, 32, num_warps=4, split=3, form="walk")
BOXES = {
    "box": {"fprop": _BOX, "dgrad": replace(_BOX, transposed=True), "wgrad": replace(_BOX, split=3, row_taps=3)},
    "walk": {"fprop": _WALK, "dgrad": _WALK, "wgrad": replace(_BOX, split=2, row_taps=9)},
}
"""Of a 3x3 of stride 1, where a test's ``source`` is one of these."""


def image(*shape: int, dtype: torch.dtype, seed: int, mean: float = 0.0) -> Tensor:
    """Normal values, [N, C, H, W] over NHWC memory."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def layer(
    ci: int, co: int, kernel: int, dtype: torch.dtype, seed: int, stride: int = 1, frozen: bool = False, **options: Any
) -> numerics.Layer:
    """A conv-BN with weights of the usual scale (float32 tensors that ``dtype`` represents exactly)."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(co, ci, kernel, kernel) * (2.0 / (ci * kernel**2)) ** 0.5
    return numerics.Layer(
        weight=weight.to(dtype).float().contiguous(memory_format=torch.channels_last),
        gamma=1 + 0.3 * normal(co),
        beta=0.3 * normal(co),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        mean=0.2 * normal(co) if frozen else None,
        var=1 + 0.5 * torch.rand(co, generator=generator) if frozen else None,
        **options,
    )


PAIR = GemmConfig(32, 16, 32, num_warps=4, split=3)
"""Of a first 1x1 whose gradients are one kernel's, where a test's ``source`` is "paired"."""


@dataclass
class Chain:
    """Layers, a shortcut (none, the input itself, a projection), an input: what runs and what it is held against."""

    x: Tensor
    layers: list[numerics.Layer]
    projection: numerics.Layer | None = None
    identity: bool = False
    source: str = "fused"
    frozen: bool = False
    seed: int = 0
    running: dict[str, Tensor] = field(default_factory=dict)
    dout: Tensor = field(init=False)

    def __post_init__(self) -> None:
        last = self.problems()[len(self.layers) - 1]
        shape = (last.N, last.Co, last.P, last.Q)
        self.dout = image(*shape, dtype=self.x.dtype, seed=self.seed + 77, mean=0.1)

    def problems(self) -> list[ConvProblem]:
        """Of the layers, then of the projection."""
        dtype = str(self.x.dtype).removeprefix("torch.")

        def conv(size: tuple[int, ...], layer: numerics.Layer) -> ConvProblem:
            n, c, h, w = size
            co, _, r, s = layer.weight.shape
            return ConvProblem(
                n, h, w, c, co, r, s, layer.stride, layer.padding, layer.dilation, layer.groups, dtype=dtype
            )

        size, found = tuple(self.x.shape), []
        for each in self.layers:
            found.append(conv(size, each))
            size = (size[0], found[-1].Co, found[-1].P, found[-1].Q)
        return [*found, *([conv(tuple(self.x.shape), self.projection)] if self.projection else [])]

    def plan(self) -> Plan:
        def choice(kind: str, problem: ConvProblem) -> Choice:
            if self.source == "vendor":
                return Choice("vendor", "a test")
            in_boxes = self.source in BOXES and problem.is_same_3x3
            return Choice("fused", "a test", BOXES[self.source][kind] if in_boxes else SMALL_TILES[kind])

        problems = self.problems()
        convs = tuple(ConvPlan(p, *(choice(kind, p) for kind in SMALL_TILES)) for p in problems)
        if self.source == "paired":
            convs = (replace(convs[0], pair=PAIR), *convs[1:])
        count = len(self.layers)
        shortcut = "identity" if self.identity else "projection" if self.projection else "none"
        projected = problems[-1] if self.projection else None
        problem = ChainProblem(tuple(problems[:count]), projected, shortcut, True, not self.frozen, True)
        return Plan("staged", "a test", problem, convs[:count], convs[-1] if self.projection else None, sm_count=1)

    def parts(self) -> list[numerics.Layer]:
        return [*self.layers, *([self.projection] if self.projection else [])]

    def run(self) -> tuple[dict[str, Tensor], list[Tensor], staged_forward.Saved]:
        """Results named as ``numerics.chain`` names them, the masks of its own ReLUs, and what forward saved."""
        operands = layer_module.operands([p.weight for p in self.parts()], self.x.dtype)
        layers = [
            layer_module.Layer(
                operands[i],
                p.gamma,
                p.beta,
                self.running.get(f"running_mean{i}") if p.mean is None else p.mean,
                self.running.get(f"running_var{i}") if p.var is None else p.var,
                None,
                0.1,
                p.eps,
                p.weight.dtype,
            )
            for i, p in enumerate(self.parts())
        ]
        plan = self.plan()
        out, saved = staged_forward.forward(plan, self.x, None, layers)
        needs = [staged_backward.Needs(True, True)] * len(layers)
        dx, _, grads = staged_backward.backward(plan, self.dout, self.x, layers, saved, needs, True, False)
        assert dx is not None
        results: dict[str, Any] = {"z": out, "dx": dx}
        for i, grad in enumerate(grads):
            suffix = "_p" if self.projection and i == len(self.layers) else str(i)
            results |= {f"dw{suffix}": grad.weight, f"dgamma{suffix}": grad.gamma, f"dbeta{suffix}": grad.beta}
        masks = []
        for y, stats in zip(saved.ys[: len(self.layers) - 1], saved.stats, strict=False):
            assert y is not None
            scale, shift = stats[2:, None, :, None, None]
            masks.append(numerics.relu_mask(y if self.frozen else y.to(stats.dtype) * scale + shift))
        return results, [*masks, numerics.relu_mask(out)], saved

    def check(self) -> list[numerics.Score]:
        """The numerics rule over everything the chain computes. AssertionError with a table if it refuses."""
        before = {name: t.clone() for name, t in self.running.items()}
        results, masks, saved = self.run()
        parts: dict[str, Any] = {"projection": self.projection} if self.projection else {}
        if self.identity:
            parts["residual"] = self.x
        eager = numerics.chain(self.x, self.layers, self.dout, dtype=self.x.dtype, **parts)
        oracle = numerics.oracle_chain(self.x, self.layers, self.dout, masks, **parts)
        forced = numerics.oracle_chain(self.x, self.layers, self.dout, eager["masks"], **parts)
        if self.identity:
            for each in (eager, oracle, forced):
                each["dx"] = each["dx"] + each["dresidual"]
        if not self.frozen:
            self._add_statistics(results, eager, oracle, forced, saved)
        for name, was in before.items():
            now = running_oracle(name, was, saved)
            results[name] = self.running[name]
            eager[name], oracle[name], forced[name] = now.to(was.dtype), now, now
        return numerics.check_all(results, eager, oracle, forced)

    def _add_statistics(self, results: dict, eager: dict, oracle: dict, forced: dict, saved: Any) -> None:
        """Mean and rstd must be those of y as it was stored: what is normalised is what was measured."""
        for i, (part, y, stats) in enumerate(zip(self.parts(), saved.ys, saved.stats, strict=True)):
            for target, values in (
                (eager, y.to(stats.dtype)),
                (oracle, y.double()),
                (forced, y.to(stats.dtype).double()),
            ):
                flat = values.movedim(1, 0).flatten(1)
                target[f"mean{i}"] = flat.mean(1)
                target[f"rstd{i}"] = (flat.var(1, unbiased=False) + part.eps).rsqrt()
            results[f"mean{i}"], results[f"rstd{i}"] = stats[0], stats[1]


def running_oracle(name: str, was: Tensor, saved: Any) -> Tensor:
    """0.9 of what was and 0.1 of the batch's mean or unbiased variance, in float64."""
    values = saved.ys[int(name[-1])].double().movedim(1, 0).flatten(1)
    return 0.9 * was.double() + 0.1 * (values.mean(1) if "mean" in name else values.var(1, unbiased=True))


def bottleneck(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any) -> Chain:
    """1x1, 3x3 of stride 2, 1x1 and a strided projection; few rows, odd sizes, channels that fill no tile."""
    frozen = options.get("frozen", False)
    x = image(3, 40, 9, 7, dtype=dtype, seed=seed, mean=0.5)
    layers = [
        layer(40, 24, 1, dtype, seed, frozen=frozen),
        layer(24, 24, 3, dtype, seed + 1, stride=2, frozen=frozen),
        layer(24, 72, 1, dtype, seed + 2, frozen=frozen),
    ]
    return Chain(x, layers, layer(40, 72, 1, dtype, seed + 3, stride=2, frozen=frozen), seed=seed, **options)


def identity(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Chain:
    """1x1, 3x3, 1x1 over a shortcut that is the input itself; variances near eps in some channels."""
    x = image(2, 48, 5, 7, dtype=dtype, seed=seed)
    layers = [layer(48, 20, 1, dtype, seed + 5), layer(20, 20, 3, dtype, seed + 6), layer(20, 48, 1, dtype, seed + 7)]
    layers[0].weight[:5] *= 2**-8
    return Chain(x, layers, identity=True, seed=seed, **options)


def plain(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Chain:
    """Two 3x3 layers in a row, without a shortcut."""
    x = image(2, 20, 9, 8, dtype=dtype, seed=seed, mean=1.0)
    layers = [layer(20, 24, 3, dtype, seed + 8, stride=2), layer(24, 20, 3, dtype, seed + 9)]
    return Chain(x, layers, seed=seed, **options)


def boxed(dtype: torch.dtype, source: str, seed: int = 0, *, basic: bool = False, frozen: bool = False) -> Chain:
    """1x1, 3x3, 1x1, or two 3x3, over a shortcut that is the input itself; pixels that boxes tile."""
    x = image(4, 32, 3, 8, dtype=dtype, seed=seed)
    kernels = (3, 3) if basic else (1, 3, 1)
    layers = [layer(32, 32, kernel, dtype, seed + i, frozen=frozen) for i, kernel in enumerate(kernels)]
    return Chain(x, layers, identity=True, source=source, seed=seed, frozen=frozen)
