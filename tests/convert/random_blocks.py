"""Home-made residual blocks drawn at random, and edits of them: what ``convert`` makes of each must equal eager.

``python -m tests.convert.random_blocks FIRST LAST`` tries those of these seeds, many more than the tests have time for.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_resnet as fr
from tests.convert.beside import drawn, results
from tests.eager import agree

WIDTHS = (4, 6, 8)


class FrozenBatchNorm2d(nn.Module):
    """As detection libraries write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-3
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class OwningConv(nn.Conv2d):
    """A convolution that calls its norm, and an activation if it has one."""

    def __init__(self, *arguments: Any, norm: nn.Module, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norm, self.activation = norm, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(super().forward(x))
        return y if self.activation is None else self.activation(y)


class Block(nn.Module):
    """What its attributes say, in the order in which most blocks are written."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.scale, self.noisy, self.shortcut_first = draw.choice((1.0,) * 9 + (0.5,)), False, draw.random() < 0.5
        self.ends = draw.choice(("relu",) * 6 + ("none", "relu6", "before"))
        self.shortcut_name = draw.choice(("downsample", "shortcut"))
        self.norm_name = draw.choice(("bn", "norm"))
        self.relus = draw.choice(("function", "one", "one", "each", "inplace"))
        self.owns = draw.random() < 0.2
        self.count = draw.choice((2, 3))
        ci, width = draw.choice(WIDTHS), draw.choice(WIDTHS)
        co, stride = (ci, 1) if draw.random() < 0.5 else (draw.choice(WIDTHS), draw.choice((1, 2)))
        place = draw.randrange(self.count)
        widths = [ci, *[width] * (self.count - 1), co]
        for i in range(self.count):
            kernel = draw.choice((1, 3)) if self.count == 3 else 3
            dilation = draw.choice((1, 1, 1, 2)) if kernel == 3 else 1
            groups = 2 if draw.random() < 0.15 else 1
            options: dict[str, Any] = {
                "stride": stride if i == place else 1,
                "padding": dilation * (kernel // 2),
                "dilation": dilation,
                "groups": groups,
                "bias": draw.random() < 0.07,
                "padding_mode": "circular" if draw.random() < 0.04 else "zeros",
            }
            norm = self.norm(draw, widths[i + 1])
            if self.owns:
                conv: nn.Module = OwningConv(widths[i], widths[i + 1], kernel, norm=norm, **options)
            else:
                conv = nn.Conv2d(widths[i], widths[i + 1], kernel, **options)
                self.add_module(f"{self.norm_name}{i + 1}", norm)
            self.add_module(f"conv{i + 1}", conv)
            if self.relus == "each":
                self.add_module(f"relu{i + 1}", draw.choice((nn.ReLU,) * 8 + (nn.SiLU,))())
        if self.relus in ("one", "inplace"):
            self.relu = nn.ReLU(inplace=self.relus == "inplace")
        self.add_module(self.shortcut_name, self.projection(draw, ci, co, stride))
        self.channels = ci
        ties = self.count == 3 and not self.owns and draw.random() < 0.3
        if ties and self.conv3.weight.shape == self.conv1.weight.shape:
            self.conv3.weight = self.conv1.weight
        if draw.random() < 0.1 and width == co and not self.owns:  # one norm in two places
            self.add_module(f"{self.norm_name}{self.count}", getattr(self, f"{self.norm_name}1"))
        if draw.random() < 0.08:
            self.dropout = nn.Dropout(0.3)

    @staticmethod
    def norm(draw: random.Random, channels: int) -> nn.Module:
        kind = draw.random()
        if kind < 0.1:
            return FrozenBatchNorm2d(channels)
        if kind < 0.14:
            return nn.GroupNorm(2, channels)
        return nn.BatchNorm2d(
            channels,
            eps=draw.choice((1e-5, 1e-3, 0.1)),
            momentum=draw.choice((0.1, 0.1, 0.5, 1.0, None)),
            affine=draw.random() < 0.9,
            track_running_stats=draw.random() < 0.93,
        )

    def projection(self, draw: random.Random, ci: int, co: int, stride: int) -> nn.Module | None:
        if (ci, stride) == (co, 1) and draw.random() < 0.8:
            return draw.choice((None, nn.Sequential(), nn.Identity()))
        if draw.random() < 0.25 and stride == 2:
            conv = nn.Conv2d(ci, co, 1, bias=False)
            return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv, self.norm(draw, co))
        kernel = draw.choice((1, 1, 1, 3))
        conv = nn.Conv2d(ci, co, kernel, stride, kernel // 2, bias=draw.random() < 0.1)
        return nn.Sequential(conv, self.norm(draw, co))

    def after(self, i: int, x: Tensor) -> Tensor:
        if self.relus == "function":
            return F.relu(x)
        return getattr(self, f"relu{i + 1}" if self.relus == "each" else "relu")(x)

    def around(self, x: Tensor) -> Tensor:
        module = self._modules[self.shortcut_name]
        return x if module is None else module(x)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.around(x) if self.shortcut_first else None
        out = x
        for i in range(self.count):
            out = getattr(self, f"conv{i + 1}")(out)
            if not self.owns:
                out = getattr(self, f"{self.norm_name}{i + 1}")(out)
            if i < self.count - 1:
                out = self.after(i, out)
        if "dropout" in self._modules:
            out = self.dropout(out)
        if self.ends == "before":
            out = self.after(self.count - 1, out)
        out = self.scale * out + (self.around(x) if residual is None else residual)
        if self.ends == "relu":
            return self.after(self.count - 1, out)
        return F.relu6(out) if self.ends == "relu6" else out


Edit = Callable[[Block], object]


def halved(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
    return out * 0.5


def norm_of(block: Block, i: int) -> nn.Module:
    return block.conv1.norm if block.owns else getattr(block, f"{block.norm_name}{i}")


def rewidened(block: Block) -> None:
    block.conv1 = copy.deepcopy(block.conv1)
    block.conv1.weight.data.mul_(2.0)


EDITS: dict[str, Edit] = {
    "nothing": lambda block: None,
    "hook on a convolution": lambda block: block.conv2.register_forward_hook(halved),
    "hook on a norm": lambda block: norm_of(block, 1).register_forward_hook(halved),
    "hook on the block": lambda block: block.register_forward_hook(halved),
    "pruning": lambda block: prune.custom_from_mask(block.conv2, "weight", block.conv2.weight > 0),
    "parametrisation": lambda block: parametrizations.weight_norm(block.conv1, dim=0),
    "scale": lambda block: setattr(block, "scale", 0.25),
    "shortcut first": lambda block: setattr(block, "shortcut_first", not block.shortcut_first),
    "no last ReLU": lambda block: setattr(block, "ends", "none"),
    "norms frozen": lambda block: [m.eval() for m in block.modules() if isinstance(m, nn.BatchNorm2d)],
    "one norm frozen": lambda block: norm_of(block, 1).eval(),
    "parameters frozen": lambda block: [p.requires_grad_(i % 2 == 0) for i, p in enumerate(block.parameters())],
    "another norm": lambda block: setattr(block, f"{block.norm_name}1", nn.Identity()) if not block.owns else None,
    "an activation owned": lambda block: setattr(block.conv1, "activation", F.silu) if block.owns else None,
    "other activations": lambda block: [
        setattr(block, name, nn.SiLU()) for name in list(block._modules) if name.startswith("relu")
    ],
    "another child": lambda block: block.add_module("dropout", nn.Dropout(0.3)),
    "a bias": lambda block: setattr(block.conv2, "bias", nn.Parameter(torch.ones(len(block.conv2.weight)).double())),
    "a convolution copied": rewidened,
    "forward replaced": lambda block: setattr(block, "forward", lambda x, whole=block.forward: whole(x) * 2),
}


def attempt(seed: int) -> int:
    """Draws two blocks, converts and edits them, and compares; how many of them were fused."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    first = Block(draw)
    second = copy.deepcopy(first) if draw.random() < 0.3 else Block(draw)
    theirs = drawn(nn.ModuleList((first, second)))
    if draw.random() < 0.5:
        theirs.to(memory_format=torch.channels_last)
    edit = list(EDITS)[seed % len(EDITS)]
    early = draw.random() < 0.3
    early &= edit not in ("forward replaced", "pruning")  # which cannot be copied
    if early:
        EDITS[edit](theirs[0])
    ours = copy.deepcopy(theirs)
    kinds = [type(block) for block in ours]
    report = fr.convert(ours)
    names = {name for name, _ in (*report.converted, *report.kept)}
    assert names == {"0", "1"}, f"passed over in silence: {names}"
    if not early:
        for blocks in (ours, theirs):
            EDITS[edit](blocks[0])
    for i in range(2):
        size = draw.choice((5, 6, 9))
        x = torch.randn(2, theirs[i].channels, size, size, dtype=torch.float64)
        if draw.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        compare(ours[i], theirs[i], x)
        ours.eval(), theirs.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours[i](x), theirs[i](x))
        ours.train(), theirs.train()
    fr.revert(ours)
    assert [type(block) for block in ours] == kinds
    compare(ours[0], theirs[0], torch.randn(2, theirs[0].channels, 6, 6, dtype=torch.float64))
    return len(report.fused_now)


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Results agree, or both refuse."""
    try:
        expected = results(theirs, x)
    except Exception as refusal:
        try:
            results(ours, x)
        except Exception:
            return
        raise AssertionError(f"ours takes what eager refuses: {refusal}") from refusal
    agree(results(ours, x), expected)


def attempts(seeds: Iterable[int]) -> tuple[int, list[str]]:
    """How many blocks were fused, and what went wrong."""
    fused, wrong = 0, []
    for seed in seeds:
        try:
            fused += attempt(seed)
        except Exception as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:600]}")
    return fused, wrong


if __name__ == "__main__":
    found, failures = attempts(range(*map(int, sys.argv[1:])))
    print(*failures, f"{found} fused", sep="\n")
