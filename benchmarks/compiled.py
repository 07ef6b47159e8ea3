"""What the compiler can tell of a network's step on a GPU that need not be there: ``python -m benchmarks.compiled``.

Each kernel of the step that the planner would run, at each of its shapes, compiled for the target and read from its
machine code; the launches that should lose the most time come first. Needs no GPU, and measures nothing. The second
time what was compiled comes from Triton's cache. docs/compiled.md says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

import fused_resnet as fr
from fused_resnet.launch.record import Launch
from fused_resnet.plan.target import PRESETS, Target, preset
from fused_resnet.projection import launch_us
from scripts.networks import build, name_of_network

from .device import ROOT
from .machine_code import Row, rows_of, step_of

PAGE = ROOT / "docs" / "compiled.md"
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
    slow = f"; slow {row.slow} ({row.slow_outside})" if row.slow + row.slow_outside else ""
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
    names = (
        "registers",
        "spilled",
        "shared",
        "programs",
        "in_flight",
        "slow",
        "slow_outside",
        "issue",
        "narrow",
        "narrow_outside",
    )
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
