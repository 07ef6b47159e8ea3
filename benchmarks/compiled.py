"""What the compiler can tell of a network's step on a GPU that need not be there: ``python -m benchmarks.compiled``.

Each kernel of the step that the planner would run, at each of its shapes, compiled for the target and read from its
machine code; the launches that should lose the most time come first. Needs no GPU, and measures nothing. The second
time what was compiled comes from Triton's cache. docs/compiled.md says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import fused_resnet as fr
from fused_resnet.compile_worker import Job, become_compiler
from fused_resnet.explain import assumption_of, image_like
from fused_resnet.jobs import Jobs, compile_all
from fused_resnet.launch.record import Launch, Rehearsed
from fused_resnet.plan.cost import floor_seconds
from fused_resnet.plan.target import PRESETS, Target, assume, preset
from fused_resnet.projection import launch_us
from fused_resnet.rehearsal import rehearse
from scripts.networks import build, name_of_network

from .device import ROOT
from .occupancy import occupancy, resources, waves
from .sass import FLOP_PER_CYCLE, Code, disassembled, parsed

PAGE = ROOT / "docs" / "compiled.md"
CLOCK = {80: 1.41e9, 90: 1.83e9}
"""Cycles a second at which the data sheets' matrix rates hold."""
SIZES = ("M", "rows", "N", "H", "W", "P", "Q", "pixels", "Ci", "Co", "C", "channels", "split", "tiles", "elements")
"""The integers that say what a launch works on, as far as a kernel has them."""


class Shape(NamedTuple):
    """One kernel as one launch of a step has it."""

    kernel: str
    sizes: str
    options: str
    """Its flags that are set."""
    tile: str


@dataclass(frozen=True)
class Row:
    """What the compiler made of the alike launches of a step. Times are of all ``count`` of them."""

    kernel: str
    sizes: str
    options: str
    tile: str
    count: int
    projected_us: float
    floor_us: float
    registers: int
    spilled: int
    """Bytes of local memory of a thread."""
    shared: int
    programs: int
    """That a processor holds at a time, and what keeps it from more."""
    limit: str
    in_flight: int
    """Bytes that all of them have asked for, at the most."""
    waves: float
    last_wave: float
    loop: dict[str, int]
    """How many instructions of each kind the main loop has; empty where there is no loop."""
    slow: int
    """Those of the loop (or of all, without one) that take four times as long, or more."""
    issue: float
    tensor: float
    """Cycles that one round of one program's main loop takes to issue, and on the tensor cores."""
    issue_us: float
    """Of all instructions, loops and the rest, if every scheduler issued one a cycle."""
    narrow: dict[str, int]
    narrow_outside: dict[str, int]
    """Accesses to global memory of fewer than 16 bytes a thread, in the main loop and outside."""

    @property
    def beyond_us(self) -> float:
        return self.projected_us - self.floor_us

    @property
    def shape(self) -> Shape:
        return Shape(self.kernel, self.sizes, self.options, self.tile)


class Alike(NamedTuple):
    """The launches of one kernel that differ in nothing that the table tells."""

    shape: Shape
    job: Job
    grid: tuple[int, ...]
    entry: Launch
    times: int


class Step(NamedTuple):
    """A step's kernels, and what is not ours to compile."""

    kernels: dict[Any, Alike]
    others: list[Launch]
    """The vendor's convolutions, a copy here and there."""


def step_of(
    model: torch.nn.Module, shape: Sequence[int], dtype: torch.dtype, target: Target, training: bool
) -> tuple[Step, list[Job]]:
    """The launches of a step, counted as ``explain`` counts them, and the distinct kernels among them."""
    jobs, step = Jobs(), Step({}, [])

    def collect(found: Rehearsed) -> None:
        job, shape = jobs.collect(found), shape_of(found)
        key = (shape, id(job), found.grid, found.entry.bytes)
        count = step.kernels[key].times if key in step.kernels else 0
        step.kernels[key] = Alike(shape, job, found.grid, found.entry, count + 1)

    with assume(assumption_of(model, target)):
        shares = rehearse(model, [image_like(shape, dtype)], dtype, training, collect)
    ours = {alike.entry.kernel for alike in step.kernels.values()}
    step.others.extend(entry for share in shares.values() for entry in share.launches if entry.kernel not in ours)
    return step, jobs.distinct


def shape_of(found: Rehearsed) -> Shape:
    given = found.arguments
    sizes = [f"{name}={given[name]}" for name in SIZES if name in given]
    if given.get("R", 1) * given.get("S", 1) > 1 or given.get("STRIDE_H", 1) > 1:
        sizes.append(f"{given.get('R', 1)}x{given.get('S', 1)}/{given.get('STRIDE_H', given.get('stride_h', 1))}")
    flags = [name.lower() for name, value in given.items() if value is True and not name.startswith("EVEN_")]
    blocks = "x".join(str(value) for name, value in given.items() if name.startswith("BLOCK_"))
    options = found.options
    cap = f" cap {options['maxnreg']}" if "maxnreg" in options else ""
    tile = f"{blocks} {options['num_warps']}w {options.get('num_stages', 1)}s{cap}"
    return Shape(found.kernel.fn.__name__, " ".join(sizes), " ".join(flags), tile)


def read(job: Job) -> tuple[Code, int, int, int]:
    """A kernel's machine code, registers, local and shared memory. It is compiled, or comes from Triton's cache."""
    compiled = job.compile()
    cubin = compiled.asm["cubin"]
    registers, local = resources(cubin)
    return parsed(disassembled(cubin), job.options["num_warps"]), registers, local, compiled.metadata.shared


def row_of(alike: Alike, made: tuple[Code, int, int, int], target: Target) -> Row:
    shape, _, grid, entry, count = alike
    code, registers, local, shared = made
    body, programs = code.loop or code.whole, math.prod(grid)
    held = occupancy(registers, shared, body.warps, target.sm)
    together = min(held.programs, -(-programs // target.sm_count))
    ran = waves(programs, held.programs, target.sm_count)
    in_flight = shared if code.uses_descriptors else body.in_flight
    cycles = issue_cycles(code, programs, entry)
    return Row(
        *shape,
        count,
        count * launch_us(entry, target),
        count * 1e6 * floor_seconds([entry], target),
        registers,
        local,
        shared,
        held.programs,
        held.limit if together == held.programs else "the grid",
        together * in_flight,
        *ran,
        dict(code.loop.mix) if code.loop else {},
        body.slow,
        body.issue_cycles,
        body.flop / FLOP_PER_CYCLE[target.sm],
        count * 1e6 * cycles / (target.sm_count * CLOCK[target.sm]),
        dict(code.loop.narrow) if code.loop else {},
        dict(code.outside.narrow),
    )


def issue_cycles(code: Code, programs: int, entry: Launch) -> float:
    """Of all programs: the rest of each once, and the main loop as often as the launch's FLOPs (or bytes) ask for."""
    if code.loop is None:
        return programs * code.whole.issue_cycles
    done = code.loop.flop or code.loop.moved() or 1
    rounds = (entry.flops if code.loop.flop else entry.bytes) / done
    return programs * code.outside.issue_cycles + rounds * code.loop.issue_cycles


def rows_of(step: Step, jobs: Sequence[Job], target: Target, workers: int | None = None) -> list[Row]:
    """Compiled and read, what should lose the most time first. From here on this process compiles for ``target``."""
    compile_all(jobs, target.sm, workers)
    become_compiler(target.sm)
    made = {id(job): read(job) for job in jobs}
    found = [row_of(alike, made[id(alike.job)], target) for alike in step.kernels.values()]
    return sorted(found, key=lambda row: -row.beyond_us)


# ---------------------------------------------------------------- the table

HEADINGS = (
    "kernel", "×", "µs", "floor", "issue µs", "programs", "KiB in flight", "regs", "spill", "shared KiB",
    "waves", "loop: tensor/convert/float/integer/global/shared/wait", "issue ÷ tensor", "narrow (outside)",
)  # fmt: skip
KINDS = ("tensor", "convert", "float", "integer", "global", "shared", "wait")


def markdown(rows: Iterable[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * 10 + "|---|--:|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)])


def _cells(row: Row) -> tuple[str, ...]:
    mix = "/".join(str(row.loop.get(kind, 0)) for kind in KINDS) if row.loop else "no loop"
    slow = f" ({row.slow} slow)" if row.slow else ""
    outside = f" ({_counted(row.narrow_outside)})" if row.narrow_outside else ""
    return (
        f"`{row.kernel.removesuffix('_kernel')}` " + "; ".join(filter(None, row.shape[1:])),
        str(row.count),
        f"{row.projected_us:.0f}",
        f"{row.floor_us:.0f}",
        f"{row.issue_us:.0f}",
        f"{row.programs}, {row.limit}",
        f"{row.in_flight / 1024:.0f}",
        str(row.registers),
        str(row.spilled),
        f"{row.shared / 1024:.0f}",
        f"{row.waves:.1f}, {100 * row.last_wave:.0f} %",
        mix + slow,
        f"{row.issue:.0f} ÷ {row.tensor:.0f} = {row.issue / row.tensor:.2f}" if row.tensor else f"{row.issue:.0f} ÷ 0",
        _counted(row.narrow) + outside,
    )


def _counted(narrow: dict[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in sorted(narrow.items())) or "none"


def changed(before: Iterable[Row], after: Iterable[Row]) -> str:
    """What became of the code of launches that both have; those that only one has."""
    names = ("registers", "spilled", "shared", "programs", "in_flight", "slow", "issue", "narrow", "narrow_outside")
    old, new = ({row.shape: row for row in rows} for rows in (before, after))
    lines = []
    for shape, row in new.items():
        then = old.get(shape)
        pairs = [(name, getattr(then, name, None), getattr(row, name)) for name in (*names, "issue_us")]
        told = [f"{n} {_plain(a)} -> {_plain(b)}" for n, a, b in pairs if then and _plain(a) != _plain(b)]
        if told or not then:
            lines.append(f"{' '.join(shape)}: {', '.join(told) or 'new'}")
    lines += [f"{' '.join(shape)}: gone" for shape in old.keys() - new.keys()]
    return "\n".join(lines) or "nothing changed"


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else _counted(value) if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------- the command


def document(arguments: argparse.Namespace, target: Target, rows: Sequence[Row], others: Sequence[Launch]) -> Any:
    vendor = [entry for entry in others if entry.kernel.startswith("vendor_")]
    return {
        "model": arguments.model,
        "batch": arguments.batch,
        "size": arguments.size,
        "dtype": arguments.dtype,
        "step": "inference" if arguments.inference else "training",
        "target": target.name,
        "sm": target.sm,
        "versions": {"fused_resnet": fr.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "launches": sum(row.count for row in rows),
        "vendor": {"launches": len(vendor), "projected_us": sum(launch_us(entry, target) for entry in vendor)},
        "rows": [asdict(row) for row in rows],
    }


def heading(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the table is of, in two sentences."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    us, floor = (sum(getattr(row, name) for row in rows) for name in ("projected_us", "floor_us"))
    return (
        f"One step ({found['step']}) of {found['model']}, batch {found['batch']}, {found['size']}², {found['dtype']}, "
        f"compiled for sm_{found['sm']} and counted for {found['target']} ({versions}). "
        f"{found['launches']} launches of our kernels, {len(rows)} different ones: projected {us / 1e3:.1f} ms, floor "
        f"{floor / 1e3:.1f}; beside them {found['vendor']['launches']} convolutions of the vendor's, projected "
        f"{found['vendor']['projected_us'] / 1e3:.1f} ms. Nothing was measured."
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=name_of_network, default="resnet50", help="a network of scripts/networks.py")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side of the images")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--target", choices=[t.name for t in PRESETS], default="h100", help="h100, h200: sm_90, a100: sm_80"
    )
    parser.add_argument("--inference", action="store_true", help="forward alone, with frozen statistics")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--top", type=int, help="only so many rows")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--before", type=Path, help="an earlier --json: print what has changed since, not the table")
    parser.add_argument("--page", action="store_true", help=f"rewrite the target's table in {PAGE.relative_to(ROOT)}")
    parser.add_argument("--workers", type=int, help="processes that compile, by default one per processor")
    arguments = parser.parse_args(words)

    target, dtype = preset(arguments.target), getattr(torch, arguments.dtype)
    with torch.device("meta"):
        model = build(fr, arguments.model, 1000, (arguments.size, arguments.size)).to(memory_format=torch.channels_last)
    training = not arguments.inference
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    step, jobs = step_of(model.train(training), shape, dtype, target, training)
    wanted = {key: value for key, value in step.kernels.items() if arguments.kernel in value.shape.kernel}
    step = step._replace(kernels=wanted)
    rows = rows_of(step, [job for job in jobs if arguments.kernel in job.kernel], target, arguments.workers)
    found = document(arguments, target, rows, step.others)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.before:
        print(changed([Row(**row) for row in json.loads(arguments.before.read_text())["rows"]], rows))
    else:
        shown = rows[: arguments.top]
        only = f" The worst {len(shown)}:" if len(shown) < len(rows) else ""
        text = f"{heading(found, rows)}{only}\n\n{markdown(shown)}"
        print(text)
        if arguments.page:
            PAGE.write_text(updated(PAGE.read_text(), target.name, text))
    return 0


def updated(page: str, name: str, table: str) -> str:
    """``page`` with the table of the target ``name`` made anew. ValueError: it has no place for one."""
    before, begin, rest = page.partition(f"<!-- {name}:begin -->")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not begin or not end:
        raise ValueError(f"the page has no place for a table of {name}")
    return f"{before}{begin}\n{table}\n{end}{after}"


if __name__ == "__main__":
    sys.exit(main())
