"""The pictures of ``docs/measured.md``, by matplotlib: an extra, without which there are tables alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import figures, page, records
from .harness import DEFAULT_CEILINGS

COLOURS = {
    "eager": "#9aa5b1",
    "graph": "#7b8794",
    "compile": "#f0b429",
    "max-autotune": "#cb6e17",
    "ours": "#4c9be8",
    "ours graph": "#0b69a3",
}


def draw(folder: Path, out: Path) -> set[str]:
    """Draws what the records allow to ``out``; the names of what was drawn. ImportError: there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "fused_resnet", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False, "figure.constrained_layout.use": True}  # fmt: skip
    from matplotlib import pyplot

    makers: dict[str, Callable[[Any, Path], bool]] = {
        "speedup": _speedup, "memory": _memory, "roofline": _roofline, "time": _time}  # fmt: skip
    drawn = set()
    for name, make in makers.items():
        figure = pyplot.figure(figsize=(8, 4))
        if make(figure, folder):
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
            drawn.add(name)
        pyplot.close(figure)
    return drawn


def _bars(figure: Any, folder: Path, value: Callable[[records.Step], float | None], label: str, digits: int) -> bool:
    """A group of bars for each model and batch, one bar a candidate."""
    found = figures.ordered(records.steps(folder))
    if not found:
        return False
    axes = figure.subplots()
    width = 0.8 / len(COLOURS)
    for i, (name, colour) in enumerate(COLOURS.items()):
        places, heights = [], []
        for group, (_, by_candidate) in enumerate(found):
            height = value(by_candidate[name]) if name in by_candidate else None
            if height is not None:
                places.append(group + (i - len(COLOURS) / 2 + 0.5) * width)
                heights.append(height)
        if heights:
            bars = axes.bar(places, heights, width, color=colour, label=figures.COLUMNS[name].replace("`", ""))
            axes.bar_label(bars, fmt=f"%.{digits}f", fontsize=7)
    words = [f"{figures.title(model)}\n{gpu.upper()}, batch {batch}" for (gpu, model, batch, _), _ in found]
    axes.set_xticks(range(len(found)), words)
    axes.set_ylabel(label)
    axes.legend(frameon=False, ncols=3)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    return True


def _speedup(figure: Any, folder: Path) -> bool:
    return _bars(figure, folder, lambda step: step.speedup, "× eager, turn by turn", 2)


def _memory(figure: Any, folder: Path) -> bool:
    return _bars(figure, folder, lambda step: step.peak_bytes and step.peak_bytes / 2**30, "peak memory, GiB", 1)


def _roofline(figure: Any, folder: Path) -> bool:
    """Left: launches with FLOPs on the roofline. Right: the fraction of its floor that each kernel's launches reach."""
    found = records.launches(folder)
    if not found:
        return False
    gpu, rows = next(iter(found.items()))
    ceilings = {**DEFAULT_CEILINGS, **records.ceilings(folder).get(gpu, {})}
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    kernels = sorted({row["kernel"] for row in rows if row["flops"] > 1e9})
    for kernel in kernels:
        mine = [row for row in rows if row["kernel"] == kernel and row["flops"] > 1e9]
        intensity = [row["flops"] / row["bytes"] for row in mine]
        rate = [row["flops"] / row["us"] / 1e6 for row in mine]
        left.loglog(intensity, rate, "o", ms=4, alpha=0.7, label=kernel.removesuffix("_kernel"))
    knee = ceilings["flops_per_s"] / ceilings["bytes_per_s"]
    least = 0.5 * min(row["flops"] / row["bytes"] for row in rows if row["flops"] > 1e9)
    top = ceilings["flops_per_s"] / 1e12
    left.plot([least, knee, 8 * knee], [least * ceilings["bytes_per_s"] / 1e12, top, top], "k-", lw=1)
    left.set_xlabel("FLOP per byte")
    left.set_ylabel(f"TFLOP/s ({gpu.upper()})")
    left.legend(frameon=False, fontsize=7)
    sums: dict[str, list[float]] = {}
    for row in rows:
        total = sums.setdefault(row["kernel"].removesuffix("_kernel"), [0.0, 0.0])
        total[0] += max(row["bytes"] / ceilings["bytes_per_s"], row["flops"] / ceilings["flops_per_s"]) * 1e6
        total[1] += row["us"]
    largest = sorted(sums.items(), key=lambda item: item[1][1])[-14:]
    right.barh([name for name, _ in largest], [floor / us for _, (floor, us) in largest], color=COLOURS["ours"])
    right.axvline(1, color="k", lw=1)
    right.set_xlabel("fraction of the floor")
    right.tick_params(axis="y", labelsize=7)
    return True


def _time(figure: Any, folder: Path) -> bool:
    """A bar for each profiled step, stacked by kernel."""
    found = records.profiles(folder)
    if not found:
        return False
    axes = figure.subplots()
    most = 10
    for place, profile in enumerate(found.values()):
        groups, bottom = list(page.shares(profile).items()), 0.0
        shown = [(name.strip("`").removesuffix("_kernel"), us) for name, (_, us) in groups[:most]]
        shown.append(("the rest", sum(us for _, (_, us) in groups[most:])))
        for name, us in shown:
            axes.bar(place, us / 1e3, 0.5, bottom=bottom / 1e3, edgecolor="white")
            if us > 0.03 * profile["busy_us"]:
                axes.text(place + 0.27, (bottom + us / 2) / 1e3, f"{name}, {us / 1e3:.1f}", va="center", fontsize=7)
            bottom += us
    axes.set_xticks(range(len(found)), [f"{item}\n{gpu.upper()}" for gpu, item in found])
    axes.set_xlim(-0.5, len(found) + 0.2)
    axes.set_ylabel("ms of kernels in a step")
    return True
