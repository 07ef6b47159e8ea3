"""The table that a comparison ends with, in plain text."""

from __future__ import annotations

from .result import Candidate, Result

ABSENT = "-"


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "  " + "   ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )

    return [line(head), "  " + "   ".join("-" * width for width in widths), *map(line, rows)]


def table(result: Result) -> str:
    """Everything found, as it is printed at the end."""
    r = result
    lines = ["", "=" * 100, *(f"  {title:<9} {text}" for title, text in r.facts.items()), ""]
    lines += grid(
        ["", "images/s", "speed-up", "step, ms (10-90 %)", "peak memory", "accuracy", "loss error"],
        [_row(r, candidate) for candidate in r.candidates.values()],
    )
    lines += ["", *_notes(r)]
    if not r.measured:
        lines += _steps(r)
    lines += _projection(r)
    lines += ["", *(f"  {sentence}" for sentence in verdict(r)), "=" * 100]
    return "\n".join(lines)


def _row(r: Result, c: Candidate) -> list[str]:
    ms, error, speed_up = c.step_ms(), r.error(c.name), r.speed_up(c.name)
    measured = r.measured and ms is not None
    accuracy = ABSENT if c.accuracy is None else f"{c.accuracy:.2%}" + ("*" if c.accuracy_note else "")
    return [
        c.name,
        f"{r.batch_size / ms[0] * 1000:,.0f}" if measured and ms else ABSENT,
        f"{speed_up:.2f}x" if measured and speed_up else ABSENT,
        f"{ms[0]:.3f} ({ms[1]:.3f}-{ms[2]:.3f})" if measured and ms else ABSENT,
        f"{c.peak_bytes / 2**20:,.0f} MiB" if c.peak_bytes is not None else ABSENT,
        accuracy,
        ABSENT if error is None else f"{error:.1e}",
    ]


def _notes(r: Result) -> list[str]:
    lines = []
    if r.truth:
        lines.append(
            f"  loss error: the largest relative distance from eager's in {r.truth_name}, "
            f"over the same {r.compared()} steps"
        )
    for c in r.candidates.values():
        if c.accuracy_note:
            lines.append(f"  * {c.name}: {c.accuracy_note}, run through the fused network")
        if c.kernels is not None:
            lines.append(
                f"  {c.name}: {c.kernels} Triton kernels and {c.vendor_convs} vendor convolutions in a training step"
            )
        if c.note:
            lines.append(f"  {c.name}: {c.note}")
    if r.measured:
        times = len(next(iter(r.candidates.values())).times_ms)
        lines.append(f"  speed: medians of {times} steps each, taken by turns, batches already on the GPU")
        if r.facts.get("model", "").startswith("small"):
            lines.append("  A model this small is bound by its launches: `--model resnet50 --data synthetic` is not.")
    return lines


def _steps(r: Result) -> list[str]:
    """The losses one by one, where they are few and all there is to see."""
    fused, exact = r.candidates.get("fused"), r.candidates.get("fused float64")
    if not fused or not exact or not r.truth:
        return []
    columns = [r.truth, exact.losses, r.candidates["eager"].losses, fused.losses]
    rows = []
    for step in range(min(r.steps, 20)):
        losses = [f"{column[step]:.9f}" if step < len(column) else ABSENT for column in columns]
        rows.append([str(step + 1), *losses])
    return ["", *grid(["loss at step", "eager float64", "fused float64", "eager float32", "fused float32"], rows)]


def _projection(r: Result) -> list[str]:
    if not r.projection:
        return []
    rows = [
        [
            f"{cost.title}: {cost.route}",
            f"{cost.flops / 1e9:,.1f}",
            f"{cost.bytes / 1e9:,.3f}",
            f"{cost.saved_bytes / 1e9:,.3f}",
            str(cost.launches),
            f"{cost.floor_us / 1000:,.3f}",
        ]
        for cost in r.projection
    ]
    head = [
        "one training step, bfloat16",
        "GFLOP",
        "GB moved",
        "GB kept for backward",
        "launches",
        "floor on an H100, ms",
    ]
    return [
        "",
        *grid(head, rows),
        "  Counted, not measured: the floor is what the bytes and FLOPs would take at the H100's full rates.",
    ]


def verdict(r: Result) -> list[str]:
    """What all of it says, in plain sentences."""
    sentences = []
    if r.interrupted:
        sentences.append("Stopped by Ctrl-C: this is what there was.")
    sentences += [f"FAILED: {failure}." for failure in r.failures]
    if not r.failures and r.agrees("fused"):
        steps = min(r.compared(), len(r.candidates["fused"].losses))
        sentences.append(
            f"The losses agree: over {steps} steps from the same weights and batches, fused is {r.error('fused'):.1e} "
            f"from {r.truth_name}, eager {r.error('eager'):.1e}; {r.tolerance():.1e} is allowed."
        )
        exact = r.candidates.get("fused float64")
        if exact and r.agrees(exact.name):
            sentences.append(
                f"In float64, where no rounding error decides a ReLU, the same kernels are {r.error(exact.name):.1e} "
                f"from eager over {len(exact.losses)} steps."
            )
    speed_up = r.speed_up("fused") if r.measured else None
    if speed_up:
        compiled = r.speed_up("compiled")
        beside = f" (compiled: {compiled:.2f} times)" if compiled else ""
        sentences.append(f"Fused trains at {speed_up:.2f} times eager's speed here{beside}.")
    elif not r.interrupted and not r.failures:
        sentences.append("No speed was measured: that takes an NVIDIA GPU. Triton's interpreter says nothing about it.")
    elif r.failures:
        sentences.append("No speed is given: a result that is wrong has none.")
    return sentences
