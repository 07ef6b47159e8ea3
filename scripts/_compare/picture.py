"""The picture that a comparison leaves: the losses, their agreement, and bars of what was measured or counted."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .result import Result, distance

COLOURS = {"eager": "#4c72b0", "compiled": "#dd8452", "fused": "#2a9d5c", "fused float64": "#8a5fb5"}
MARKS = {"eager": "o", "compiled": "s", "fused": "x", "fused float64": "+"}
GREY = "#555555"


def draw(result: Result, path: Path) -> None:
    """Writes a PNG. Draws whatever there is, an interrupted run's too."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), dpi=110, layout="constrained", width_ratios=(1.2, 1, 1))
    _training(axes[0], result)
    _agreement(axes[1], result)
    if result.measured:
        _speed(axes[2], result)
    else:
        _counted(axes[2], result)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    facts = result.facts
    figure.suptitle(" · ".join(facts[key] for key in ("model", "images", "device") if key in facts), fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def _training(axis: Axes, r: Result) -> None:
    """The whole training, smoothed, with the held-out accuracy in the legend."""
    axis.set(title="training", xlabel="step", ylabel="loss")
    longest = max((len(c.losses) for c in r.candidates.values()), default=0)
    for name, c in r.candidates.items():
        if not c.losses or c.exact:
            continue
        accuracy = (
            f", {c.accuracy:.1%} right on held-out images" if c.accuracy is not None and not c.accuracy_note else ""
        )
        steps = range(1, len(c.losses) + 1)
        if len(c.losses) <= r.steps < longest:
            label = f"{name}: its first {len(c.losses)} steps"
            axis.plot(steps, c.losses, MARKS[name], color=COLOURS[name], label=label, markersize=6, zorder=3)
        else:
            axis.plot(steps, c.losses, color=COLOURS[name], alpha=0.25, linewidth=1)
            axis.plot(steps, _smooth(c.losses), color=COLOURS[name], label=name + accuracy, linewidth=2)
    if longest:
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=9)


def _smooth(values: list[float]) -> list[float]:
    """Means over a window around each step, a twentieth of the run wide."""
    reach = len(values) // 40
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _agreement(axis: Axes, r: Result) -> None:
    """Each compared loss's distance from the higher precision's."""
    axis.set(title=f"distance of the loss from {r.truth_name}", xlabel="step", ylabel="relative distance")
    drawn = False
    for name, c in r.candidates.items():
        pairs = list(zip(c.losses[: r.steps], r.truth))
        if not pairs:
            continue
        # A distance of exactly nothing has no place on a logarithmic axis: it is drawn at its foot.
        distances = [max(distance(*pair), 1e-17) for pair in pairs]
        steps = range(1, len(pairs) + 1)
        axis.plot(steps, distances, MARKS[name] + "-", color=COLOURS[name], label=name, linewidth=1, markersize=6)
        drawn = True
    if drawn:
        axis.set_yscale("log")
        axis.axhline(r.tolerance(), color=GREY, linestyle="--", linewidth=1, label="allowed")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=9)


def _speed(axis: Axes, r: Result) -> None:
    """Images per second, with the spread and the peak memory."""
    timed = {name: c for name, c in r.candidates.items() if c.step_ms()}
    axis.set(title="images per second (measured)", ylabel="images/s")
    for i, (name, c) in enumerate(timed.items()):
        median, low, high = c.step_ms() or (1.0, 1.0, 1.0)
        rate, slow, fast = (r.batch_size * 1000 / ms for ms in (median, high, low))
        axis.bar(i, rate, 0.6, color=COLOURS[name], yerr=[[rate - slow], [fast - rate]], capsize=5)
        memory = "" if c.peak_bytes is None else f"\n{c.peak_bytes / 2**20:,.0f} MiB"
        axis.text(i, fast, f"{rate:,.0f}\n{r.speed_up(name):.2f}x{memory}", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(timed)), list(timed))
    axis.margins(y=0.25)


def _counted(axis: Axes, r: Result) -> None:
    """What explain counts for an H100: fused as a share of eager."""
    axis.set(title="counted for an H100, not measured", ylabel="fused as a share of eager")
    pairs = list(zip(r.projection[::2], r.projection[1::2]))
    kinds = {
        "bytes": "memory\ntraffic",
        "saved_bytes": "kept for\nbackward",
        "launches": "kernel\nlaunches",
        "floor_us": "floor\nin time",
    }
    width = 0.8 / max(len(pairs), 1)
    for j, (eager, fused) in enumerate(pairs):
        shares = [getattr(fused, kind) / max(getattr(eager, kind), 1e-9) for kind in kinds]
        places = [i + (j - (len(pairs) - 1) / 2) * width for i in range(len(kinds))]
        bars = axis.bar(places, shares, width * 0.9, color=COLOURS["fused"], alpha=1 - 0.45 * j, label=fused.title)
        axis.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8)
    if not pairs:
        axis.text(0.5, 0.5, "no speed was measured", ha="center", va="center", transform=axis.transAxes, color=GREY)
        return
    axis.axhline(1, color=COLOURS["eager"], linewidth=1.5, label="eager")
    axis.set_xticks(range(len(kinds)), list(kinds.values()))
    axis.margins(y=0.3)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
