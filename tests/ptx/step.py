"""The counts of traffic.py for every kernel of a training step of ResNet-50: real sizes, the tiles that are planned.

    python -m tests.ptx.step [--target a100] [--kernel NAME] [--page]

Some programs of each launch run, on zeros; what they count stands for all. Takes four minutes. docs/compiled.md holds
the table, and says how to read it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import fused_resnet as fr
from benchmarks.compiled import PAGE, updated
from benchmarks.machine_code import CLOCK, Shape, shape_of
from fused_resnet.compile_worker import become_compiler
from fused_resnet.explain import assumption_of, image_like
from fused_resnet.launch.record import Rehearsed
from fused_resnet.plan.target import Target, assume, preset
from fused_resnet.projection import launch_us
from fused_resnet.rehearsal import rehearse
from scripts.networks import build

from .emulate import execute
from .traffic import Count, Place, Traffic, counted

PROGRAMS = 8
"""Of each launch, drawn by chance."""
ALIGNMENT = 512
"""Bytes, of what a GPU allocates."""
HEADINGS = ("kernel", "×", "µs", "shared µs", "of them conflicts", "sectors ÷ fewest", "most conflicts")


@dataclass
class Launched:
    """The alike launches of a step, and what some programs of one of them moved."""

    launch: Rehearsed
    times: int
    traffic: Traffic
    programs: int

    @property
    def scale(self) -> float:
        """All programs of all launches over those that ran."""
        return self.times * math.prod(self.launch.grid) / self.programs


def launches(target: Target, batch: int = 256) -> dict[tuple[Shape, tuple[int, ...], int], tuple[Rehearsed, int]]:
    """The different launches of a training step in bfloat16 and how often each is made; nothing has run."""
    found: dict[Any, tuple[Rehearsed, int]] = {}

    def collect(launch: Rehearsed) -> None:
        key = shape_of(launch), launch.grid, launch.entry.bytes
        first, times = found.get(key, (launch, 0))
        found[key] = first, times + 1

    with torch.device("meta"):
        network = build(fr, "resnet50", 1000, (224, 224)).to(memory_format=torch.channels_last).train()
    with assume(assumption_of(network, target)):
        rehearse(network, [image_like((batch, 3, 224, 224), torch.bfloat16)], torch.bfloat16, True, collect)
    return found


def real(value: Any) -> Any:
    """Zeros in the place of what is on ``meta``: of those that nobody writes there is one page."""
    if isinstance(value, torch.Tensor):
        nbytes = value.untyped_storage().nbytes()
        raw = torch.from_numpy(np.zeros(nbytes + ALIGNMENT, np.uint8))
        raw = raw[-raw.data_ptr() % ALIGNMENT :][:nbytes].view(value.dtype)
        return raw.as_strided(value.shape, value.stride(), raw.storage_offset() + value.storage_offset())
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(real(value.base), value.shape, value.strides, value.block_shape)
    return type(value)(*map(real, value)) if isinstance(value, tuple) else value


def ran(launch: Rehearsed, times: int = 1, programs: int = PROGRAMS) -> Launched:
    """After some programs of a launch. This process compiles for its target (``become_compiler``)."""
    arguments = {name: real(value) for name, value in launch.arguments.items()}
    compiled = launch.kernel.warmup(grid=(1,), **arguments, **launch.options)
    total = math.prod(launch.grid)
    some = sorted(random.Random(1).sample(range(total), min(total, programs)))
    with counted() as traffic:
        execute(compiled, [arguments.get(p.name, p.default) for p in launch.kernel.params], launch.grid, some)
    return Launched(launch, times, traffic, len(some))


# ---------------------------------------------------------------- the table


def markdown(found: Iterable[Launched], target: Target) -> str:
    """A row for each kernel, what conflicts cost the most first."""
    ordered = sorted(found, key=lambda each: each.launch.kernel.fn.__name__)
    kernels = [list(rows) for _, rows in itertools.groupby(ordered, lambda each: each.launch.kernel.fn.__name__)]
    cycles_per_us = target.sm_count * CLOCK[target.sm] / 1e6
    rows = sorted((_row(rows, cycles_per_us, target) for rows in kernels), key=lambda row: (-row[0], -row[1]))
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * (len(HEADINGS) - 2) + "|---|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for _, _, cells in rows)])


def _row(rows: Sequence[Launched], cycles_per_us: float, target: Target) -> tuple[float, float, tuple[str, ...]]:
    us = sum(each.times * launch_us(each.launch.entry, target) for each in rows)
    taken, fewest = (
        sum(each.scale * getattr(each.traffic.total("shared"), name) for each in rows) / cycles_per_us
        for name in ("taken", "fewest")
    )
    touched, wanted = (
        sum(each.scale * getattr(each.traffic.total("global"), name) for each in rows) for name in ("taken", "fewest")
    )
    worst = max(rows, key=lambda each: each.scale * _excess(each.traffic.total("shared")))
    place, count = max(worst.traffic.counts.items(), key=lambda pair: _excess(pair[1]) * (pair[0].memory == "shared"))
    cells = (
        f"`{rows[0].launch.kernel.fn.__name__.removesuffix('_kernel')}`",
        str(sum(each.times for each in rows)),
        f"{us:.0f}",
        f"{taken:.1f}",
        f"{taken - fewest:.1f}",
        f"{touched / wanted:.2f}" if wanted else "",
        f"{_told(place)}: {count.ratio:.1f} ×, {worst.traffic.total('shared').ratio:.2f} × in all"
        if taken > fewest
        else "",
    )
    return taken - fewest, us, cells


def _excess(count: Count) -> int:
    return count.taken - count.fewest


def _told(place: Place) -> str:
    instruction = place.kernel.code[place.at]
    return f"`{instruction.opcode[0]}` of {instruction.line.rpartition(':')[0]}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("h100", "h200", "a100"), default="h100")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--page", action="store_true", help=f"rewrite the table in {PAGE.name}")
    arguments = parser.parse_args(words)
    target = preset(arguments.target)
    become_compiler(target.sm)
    wanted = [pair for pair in launches(target).values() if arguments.kernel in pair[0].kernel.fn.__name__]
    table = markdown([ran(launch, times) for launch, times in wanted], target)
    text = f"Compiled for sm_{target.sm} by triton {triton.__version__}. Nothing was measured.\n\n{table}"
    print(text)
    if arguments.page:
        PAGE.write_text(updated(PAGE.read_text(), "traffic", text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
