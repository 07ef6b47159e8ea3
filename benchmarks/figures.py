"""The README's table, made from the records; and which of its figures no record holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from . import records
from .records import Step

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NOT_YET = "not measured yet"
COLUMNS = {
    "eager": "eager",
    "graph": "eager, CUDA graph",
    "compile": "`torch.compile`",
    "max-autotune": "`torch.compile`, max-autotune",
    "ours": "fused",
    "ours graph": "fused, CUDA graph",
}
ORDER = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")


def title(model: str) -> str:
    return re.sub(r"resnet(\d+)", r"ResNet-\1", model)


def ordered(found: Iterable[Step]) -> list[tuple[tuple[str, str, int, str], dict[str, Step]]]:
    """The newest of each, ResNet-50 and large batches first."""

    def place(where: tuple[str, str, int, str]) -> tuple[str, str, int, int]:
        gpu, model, batch, dtype = where
        return gpu, dtype, ORDER.index(model) if model in ORDER else len(ORDER), -batch

    return sorted(records.newest(found).items(), key=lambda item: place(item[0]))


def table(found: list[Step]) -> str:
    """The README's: images per second and peak memory of a training step, by candidate."""
    lines = [f"| GPU | model, batch | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (gpu, model, batch, dtype), by_candidate in ordered(found):
        fastest = max(by_candidate.values(), key=lambda step: step.images_per_s)
        what = f"{title(model)}, {batch}" + (f", {dtype}" if dtype != "bfloat16" else "")
        cells = [_cell(by_candidate.get(name), fastest) for name in COLUMNS]
        lines.append(f"| {gpu.upper()} | {what} | {' | '.join(cells)} |")
    if len(lines) == 2:
        lines.append(f"| any | any | {' | '.join([NOT_YET] * len(COLUMNS))} |")
    return "\n".join([*lines, *_apart(found)])


def _cell(step: Step | None, fastest: Step) -> str:
    if step is None:
        return NOT_YET
    rate = f"{step.images_per_s:,.0f}"
    memory = f" ({step.peak_bytes / 2**30:.1f} GiB)" if step.peak_bytes else ""
    return (f"**{rate}**" if step is fastest else rate) + memory


def _apart(found: list[Step]) -> list[str]:
    """A sentence on the cells that were measured beside another eager step than the one in their row."""
    notes = []
    for name, words in COLUMNS.items():
        others = []
        for (_, model, batch, _), by_candidate in ordered(found):
            step, eager = by_candidate.get(name), by_candidate.get("eager")
            if step and eager and name != "eager" and f"{step.beside:,.0f}" != f"{eager.images_per_s:,.0f}":
                others.append(f"{step.beside:,.0f} ({title(model)}, {batch})")
        if others:
            notes.append(f"{words} took turns with another eager step than its row's: {', '.join(others)} images/s.")
    return ["", *notes] if notes else []


def updated(readme: str, found: list[Step]) -> str:
    """``readme`` with the table between its markers made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


# ---------------------------------------------------------------- claims


_NUMBER = r"(?<![\w.,-])(?P<number>\d+(?:,\d{3})*(?:\.\d+)?)"
_UNITS = {
    "rate": r"\s?k?\s*(?:img|images?)\s*(?:/\s*s|per second)",
    "ratio": r"\s*(?:×|x|times)(?![\w×])(?!\s*\d)",
    "percent": r"\s*%",
    "us": r"\s*(?:us|µs|μs|microseconds)\b",
    "ms": r"\s*(?:ms|milliseconds)\b",
    "memory": r"\s*(?:GiB|GB|MiB|MB)\b(?!/s)",
    "TB/s": r"\s*TB/s",
    "TFLOP/s": r"\s*TFLOP/?s",
    "large": r"(?=,|[^\d])",
}
"""A figure of performance: a number and its unit. ``large`` is a number of thousands without one: a rate."""
_CLAIM = re.compile(_NUMBER + "(?:" + "|".join(f"(?P<{_name}>{_unit})" for _name, _unit in (
    (name.replace("/", ""), unit) for name, unit in _UNITS.items())) + ")")  # fmt: skip

_BOARD = re.compile(r"(\d+)GB")
"""The memory that a board is named after."""


def claims(text: str) -> list[tuple[str, str]]:
    """The figures of performance in a text: (number with its unit, kind)."""
    found = []
    for match in _CLAIM.finditer(text):
        kind = match.lastgroup or ""
        if kind != "large" or "," in match["number"]:
            found.append((match[0].strip(), kind))
    return found


def unheld(text: str, folder: Path = records.FOLDER) -> list[str]:
    """The figures in ``text`` that no record holds, rounded as they stand there."""
    steps = records.steps(folder)
    memory = [step.peak_bytes for step in steps if step.peak_bytes]
    for _, document in records.documents(folder):
        facts = document.get("facts", {})
        memory += [facts.get("memory_bytes", 0), *(int(size) * 10**9 for size in _BOARD.findall(str(facts.get("gpu"))))]
    ratios = [step.speedup for step in steps]
    for by_candidate in records.newest(steps).values():
        peaks = {name: step.peak_bytes for name, step in by_candidate.items() if step.peak_bytes}
        ratios += [peak / peaks["eager"] for peak in peaks.values() if "eager" in peaks]
    rates = records.ceilings(folder).values()
    beside = [rate for step in steps for rate in (step.images_per_s, step.beside)]
    held = {
        "rate": [*beside, *(value / 1e3 for value in beside)],
        "large": beside,
        "ratio": ratios,
        "percent": [part for r in ratios for part in (100 * r, 100 * abs(r - 1), 100 * abs(1 - 1 / r))],
        "us": [step.us for step in steps],
        "ms": [step.us / 1e3 for step in steps],
        "memory": [size / unit for size in memory for unit in (2**30, 1e9)],
        "TBs": [rate["bytes_per_s"] / 1e12 for rate in rates],
        "TFLOPs": [rate["flops_per_s"] / 1e12 for rate in rates],
    }
    return [claim for claim, kind in claims(text) if not _is_held(claim, held[kind])]


def _is_held(claim: str, values: list[float]) -> bool:
    number = re.match(r"[\d,.]+", claim)
    assert number is not None
    digits = number[0].replace(",", "").rstrip(".")
    decimals = len(digits.partition(".")[2])
    return any(round(value, decimals) == float(digits) for value in values)
