"""The page of what was measured, ``docs/measured.md``: made from the records, with the pictures that plots.py draws."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import figures, records

LIMIT = 1.5
"""A kernel over this many times its floor is named."""
PICTURES = {
    "speedup": "Speed-up over eager PyTorch, by model and batch",
    "memory": "Peak memory of a training step",
    "roofline": "Every launch of a training step against the floor",
    "time": "Where a step's time goes",
}
GROUPS = (
    (r"sm\d+_xmma|cutlass|nvjet|cudnn|nhwcAddPadding", "the vendor's convolutions and products"),
    (r"max_pool", "PyTorch's pooling"),
    (r"batch_norm", "PyTorch's batch norm"),
    (r"multi_tensor_apply", "the optimizer"),
    (r"at::|void |Mem(set|cpy)", "PyTorch's elementwise kernels, casts, copies"),
)
"""What the kernels of others go by in a table; ours keep their names."""


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def speedups(found: list[records.Step]) -> list[tuple[Any, ...]]:
    """Each newest candidate beside what took turns with it."""
    rows = []
    for (gpu, model, batch, dtype), by_candidate in figures.ordered(found):
        for name, step in by_candidate.items():
            peak = f"{step.peak_bytes / 2**30:.2f}" if step.peak_bytes else ""
            rows.append((gpu.upper(), figures.title(model), batch, dtype, name, f"{step.images_per_s:,.0f}",
                         f"{step.us / 1e3:.2f}", f"{step.speedup:.2f}", peak, step.source))  # fmt: skip
    return rows


def fractions(folder: Path) -> list[tuple[Any, ...]]:
    """Each kernel's time, its floor, and the fraction of the floor; the slowest against it first."""
    found = sorted(records.kernels(folder).values(), key=lambda kernel: kernel.floor_us / kernel.us)
    return [(kernel.gpu.upper(), kernel.name, f"{kernel.us:.0f}", f"{kernel.floor_us:.0f}",
             f"{kernel.floor_us / kernel.us:.2f}" + (" (!)" if kernel.us > LIMIT * kernel.floor_us else ""))
            for kernel in found if kernel.floor_us >= 1]  # fmt: skip


def shares(profile: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(calls, microseconds) of a profiled step by group of kernels, the longest first."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in profile["rows"]:
        group = next((words for pattern, words in GROUPS if re.search(pattern, row["kernel"])), f"`{row['kernel']}`")
        found[group][0] += row["calls"]
        found[group][1] += row["us"]
    return {name: (calls, us) for name, (calls, us) in sorted(found.items(), key=lambda item: -item[1][1])}


def _parts(folder: Path, pictures: set[str]) -> Iterator[str]:
    yield "# What was measured"
    yield (
        "Made by `scripts/report` from `benchmarks/records/`; do not edit. The newest record of each thing counts, "
        "whatever changed in the code since. How a figure is taken and what was learnt: "
        "[benchmarks/README.md](../benchmarks/README.md)."
    )

    def picture(name: str) -> Iterator[str]:
        if name in pictures:
            yield f"![{PICTURES[name]}](measured/{name}.svg)"

    yield "## Training steps"
    found = records.steps(folder)
    if found:
        yield "The speed-up is over the eager step of the same process, which took turns with it."
        head = ("GPU", "model", "batch", "dtype", "candidate", "images/s", "ms", "speed-up", "peak GiB", "record")
        yield table(head, speedups(found))
        yield from picture("speedup")
        yield from picture("memory")
    else:
        yield f"{figures.NOT_YET.capitalize()}."
    yield "## Kernels against their floor"
    rows = fractions(folder)
    if rows:
        yield f"(!): over {LIMIT} times its floor. Kernels with a floor below a microsecond are left out."
        yield table(("GPU", "kernel", "us", "floor, us", "floor ÷ time"), rows)
        yield from picture("roofline")
    else:
        yield f"{figures.NOT_YET.capitalize()}."
    yield "## Where a step's time goes"
    profiles = records.profiles(folder)
    for (gpu, item), profile in profiles.items():
        busy = profile["busy_us"]
        rows = [(name, f"{calls:.0f}", f"{us:,.0f}", f"{100 * us / busy:.1f} %")
                for name, (calls, us) in shares(profile).items() if us >= 0.002 * busy]  # fmt: skip
        yield f"### {item}, {gpu.upper()}: {busy / 1e3:.1f} ms of kernels"
        yield table(("kernels", "launches", "us a step", "share"), rows)
    yield from picture("time") if profiles else [f"{figures.NOT_YET.capitalize()}."]


def page(folder: Path = records.FOLDER, pictures: set[str] | None = None) -> str:
    """The whole page; ``pictures`` are the names of those that were drawn."""
    return "\n\n".join(_parts(folder, pictures or set())) + "\n"
