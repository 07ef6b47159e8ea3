"""A bottleneck through the public operation, any route, beside eager PyTorch and the float64 oracle of the rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import functional, use_route
from fused_resnet.plan.target import A100, H100, INTERPRETER, Assumption, assume
from tests import numerics
from tests.conftest import EMULATED
from tests.staged_case import image, layer

BFLOAT16_TOO = Assumption(replace(INTERPRETER, dtypes=INTERPRETER.dtypes | {"bfloat16"}))
"""What the strict interpreter computes; Triton's own has no bfloat16."""
PLANNED_FOR = {0: BFLOAT16_TOO, 80: Assumption(A100), 90: Assumption(H100)}[EMULATED]
RUNNING = ("running_mean", "running_var")
VECTORS = ("dgamma", "dbeta", *RUNNING)


@dataclass
class Block:
    """conv-BN-ReLU three times around a shortcut, in training; ``dout`` [like the output]."""

    x: Tensor
    layers: list[numerics.Layer]
    projection: numerics.Layer | None
    dout: Tensor
    running: dict[str, Tensor] = field(default_factory=dict)
    """What the BatchNorms start from; ``run`` leaves what they end with in its results."""
    group: str | None = None
    """The process group whose images are normalised together."""

    @property
    def parts(self) -> dict[str, numerics.Layer]:
        """By the suffix that ``numerics.chain`` gives their results."""
        parts = {str(i): part for i, part in enumerate(self.layers)}
        return parts | ({"_p": self.projection} if self.projection else {})

    def run(self, route: str = "gram", strict: bool = True) -> tuple[dict[str, Any], list[Tensor]]:
        """Results named as ``numerics.chain`` names them, running statistics too, and the masks of the three ReLUs."""
        leaves, running, operands = {}, {}, {}
        for suffix, part in self.parts.items():
            values = (part.weight.to(self.x.dtype), part.gamma, part.beta)
            own = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in values]
            kept = self._buffers(part)
            conv = functional.Conv(own[0], part.stride, part.padding, part.dilation, part.groups)
            operands[suffix] = (conv, functional.BatchNorm(own[1], own[2], *kept, eps=part.eps, group=self.group))
            leaves |= {name + suffix: t for name, t in zip(("dw", "dgamma", "dbeta"), own, strict=True)}
            running |= {name + suffix: t for name, t in zip(RUNNING, kept, strict=True)}
        x = self.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with assume(PLANNED_FOR), use_route(route, strict=strict):
            out = functional.bottleneck(x, [operands[str(i)] for i in range(3)], operands.get("_p"))
        out.backward(self.dout)
        results = {"z": out.detach(), "dx": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}
        return results | running, [*self._inner_masks(operands), numerics.relu_mask(out.detach())]

    def _inner_masks(self, operands: dict[str, Any]) -> list[Tensor]:
        """Of the ReLUs between, by the same kernels one layer at a time: no route writes both activations."""
        masks, a = [], self.x
        with torch.no_grad(), assume(PLANNED_FOR), use_route("staged", strict=True):
            for i in range(2):
                conv, bn = operands[str(i)]
                bn = bn._replace(running_mean=None, running_var=None)
                a = functional.conv_bn_relu(a, conv.weight, bn, stride=conv.stride, padding=conv.padding)
                masks.append(numerics.relu_mask(a))
        return masks

    def _buffers(self, part: numerics.Layer) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(part.gamma), torch.ones_like(part.gamma)

    def plain(self, dtype: torch.dtype, masks: list[Tensor] | None = None) -> dict[str, Any]:
        """The same by PyTorch, in ``dtype``."""
        if self.projection is not None:
            results = numerics.chain(
                self.x, self.layers, self.dout, dtype=dtype, masks=masks, projection=self.projection
            )
        else:
            results = numerics.chain(self.x, self.layers, self.dout, dtype=dtype, masks=masks, residual=self.x)
            results["dx"] = results["dx"] + results.pop("dresidual")
        return results | self._plain_running(dtype)

    def _plain_running(self, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found: dict[str, Tensor] = {}

        def conv_bn(a: Tensor, suffix: str) -> Tensor:
            part = self.parts[suffix]
            kept = [t.to(wide) for t in self._buffers(part)]
            y = F.conv2d(a, part.weight.to(dtype), None, part.stride, part.padding)
            z = F.batch_norm(y, *kept, part.gamma.to(wide), part.beta.to(wide), True, 0.1, part.eps)
            found.update({name + suffix: t for name, t in zip(RUNNING, kept, strict=True)})
            return z

        with torch.no_grad():
            a = self.x.to(dtype)
            for suffix in self.parts:
                a = conv_bn(self.x.to(dtype) if suffix == "_p" else a, suffix).relu()
        return found

    def scores(self, route: str = "gram", float32_factor: float = 2.0, **options: Any) -> list[numerics.Score]:
        """The numerics rule over all that the block computes, each ReLU's mask teacher-forced.

        Part A is silent where eager itself is beyond it: some inputs leave nobody the dtype's digits. Part M, which
        finds one wrong pixel among many, allows a vector three times eager's maximum: of twenty errors the largest
        differs by more than that of many. ``float32_factor``: how many times eager's error is allowed in float32, twice
        as many times its maximum, where a caller has a reason for more.
        """
        results, masks = self.run(route, **options)
        eager = self.plain(self.x.dtype)
        oracles = self.plain(torch.float64, masks), self.plain(torch.float64, eager["masks"])
        scores = numerics.score_all(results, eager, *oracles)
        for score in scores:
            excused = "A:" if score.eager_error > numerics.ABSOLUTE.get(self.x.dtype, 0.0) else ""
            most = 3.0 if score.name.startswith(VECTORS) else 0.0
            if self.x.dtype == torch.float32 and float32_factor > 2:
                excused += "R:" if score.ratio <= float32_factor else ""
                most = 2 * float32_factor
            excused += "M:" if score.maximum <= most * score.eager_maximum else ""
            score.failures = [failure for failure in score.failures if failure[:2] not in excused]
        return scores

    def check(self, route: str = "gram", **options: Any) -> list[numerics.Score]:
        """AssertionError with the table of all results if the rule refuses any."""
        scores = self.scores(route, **options)
        refused = [s.name for s in scores if not s.ok]
        assert not refused, f"refused: {', '.join(refused)}\n{numerics.table(scores)}"
        return scores


def check_draws(blocks: Iterable[Block], **options: Any) -> None:
    """The rule over several draws in float32: of a vector the RMS error over all of them counts.

    The error of twenty sums that nearly cancel differs from draw to draw by a factor of two, eager's and ours.
    """
    blocks = list(blocks)
    assert all(block.x.dtype == torch.float32 for block in blocks)
    draws = [block.scores(**options) for block in blocks]
    for scores in zip(*draws, strict=True):
        error, eager = (math.hypot(*errors) for errors in zip(*((s.error, s.eager_error) for s in scores), strict=True))
        for score in scores:
            if score.name.startswith(VECTORS) and error <= 2 * eager:
                score.failures = [failure for failure in score.failures if not failure.startswith("R:")]
    refused = [score for score in itertools.chain(*draws) if not score.ok]
    assert not refused, f"refused:\n{numerics.table(refused)}"


def rounded_elsewhere(block: Block, factor: float = 1.3) -> Block:
    """The same function of x, the weights and dout: what the ReLUs in between give comes ``factor`` times as large.

    The next BatchNorm takes that away again. What is stored in 16 bits in between is rounded elsewhere.
    """
    first, second, last = block.layers
    first, second = (replace(part, gamma=part.gamma * factor, beta=part.beta * factor) for part in (first, second))
    second, last = (replace(part, eps=part.eps * factor**2) for part in (second, last))
    return replace(block, layers=[first, second, last])


def eager_again(block: Block) -> float:
    """The relative RMS error of eager's dx over eager's, of one evaluation against another as good."""
    found = [(each.plain(block.x.dtype), each) for each in (rounded_elsewhere(block), block)]
    (again, eager), oracles = (
        [results["dx"] for results, _ in found],
        [each.plain(torch.float64, results["masks"])["dx"] for results, each in found],
    )
    return numerics.score(again, eager, oracles[0], "dx", eager_oracle=oracles[1]).ratio


def check_typical(blocks: Iterable[Block], most: float, worst: float = math.inf) -> None:
    """AssertionError where our dx is more than ``most`` times as wrong as eager's, in the geometric mean over draws.

    Of two evaluations as good as each other that mean is 1, however far a single draw may be from it.
    """
    ratios = [score.ratio for block in blocks for score in block.scores() if score.name == "dx"]
    assert geometric_mean(ratios) <= most and max(ratios) <= worst, f"{geometric_mean(ratios):.3f} of {ratios}"


def identity_block(
    dtype: torch.dtype, seed: int = 0, size: tuple[int, int, int] = (5, 9, 7), p: int = 20, q: int = 48
) -> Block:
    """1x1, 3x3, 1x1 over its own input; few rows, channels that fill no tile."""
    n, h, w = size
    layers = [layer(q, p, 1, dtype, seed), layer(p, p, 3, dtype, seed + 1), layer(p, q, 1, dtype, seed + 2)]
    return Block(
        image(n, q, h, w, dtype=dtype, seed=seed),
        layers,
        None,
        image(n, q, h, w, dtype=dtype, seed=seed + 77, mean=0.1),
    )


def projected_block(
    dtype: torch.dtype, seed: int = 0, size: tuple[int, int, int] = (5, 9, 7), ci: int = 40, p: int = 24, q: int = 72
) -> Block:
    """With a 3x3 of stride 2 and a strided projection."""
    return bottleneck(dtype, ci, p, q, 2, size, seed)


def bottleneck(
    dtype: torch.dtype, ci: int, p: int, q: int, stride: int, size: tuple[int, int, int], seed: int = 0
) -> Block:
    """1x1, 3x3, 1x1 from ``ci`` to ``q`` channels by ``p``, and a projection where the shortcut needs one."""
    n, h, w = size
    convs = [(ci, p, 1, 1), (p, p, 3, stride), (p, q, 1, 1)]
    return Block(
        image(n, ci, h, w, dtype=dtype, seed=seed, mean=0.5),
        [layer(*shape, dtype, seed + i, stride=by) for i, (*shape, by) in enumerate(convs)],
        layer(ci, q, 1, dtype, seed + 3, stride=stride) if stride > 1 or ci != q else None,
        image(n, q, -(-h // stride), -(-w // stride), dtype=dtype, seed=seed + 77, mean=0.1),
    )
