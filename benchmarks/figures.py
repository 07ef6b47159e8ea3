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


_NUMBER = r"(?<![\w.,'])(?<![A-Za-z]-)(?P<number>\d+(?:[,_']\d{3})*(?:\.\d+)?(?:e\d+)?)"
_PER = r"\s*(?:/|per|a|every)\s*s(?:ec(?:ond)?)?\b"
_UNITS = {
    "rate": rf"\s?k?\s*(?:(?:im|imgs?|images?|samples?|frames?){_PER}|/\s*s\b|[if]ps\b)",
    "ratio": r"(?:\s*(?:×|x|times|&times;)(?![\w×])(?!\s*\d)|[\s-]?fold\b)",
    "percent": r"\s*(?:%|per\s?cent\b)",
    "ns": r"\s*(?:ns|nanoseconds?)\b",
    "us": r"\s*(?:us|µs|μs|microseconds?)\b",
    "ms": r"\s*(?:ms|milliseconds?)\b",
    "seconds": r"\s*(?:s|sec|seconds?|min|minutes?|h|hours?)\b",
    "memory": r"\s*(?:GiB|GB|MiB|MB|gigabytes?|megabytes?)\b(?!\s*(?:/|per))",
    "bandwidth": rf"\s*[GT]i?B{_PER}",
    "matrix": rf"\s*[GTP]FLOP(?:S\b|s\b|{_PER})",
    "large": r"(?=,|[^\d])",
}
"""A figure of performance: a number and its unit. ``large`` is a number of thousands without one: a rate."""
_CLAIM = re.compile(_NUMBER + "(?:" + "|".join(f"(?P<{name}>{unit})" for name, unit in _UNITS.items()) + ")")
_FACTOR = re.compile(r"\b(?:[Ff]actors?(?:\s+of)?|[Ss]peed-?ups?\s+of)\s+(?P<number>\d+(?:\.\d+)?)(?!\d*\s*[×x%])")
_TIMES = "twice|thrice|half|(?:two|three|four|five|six|seven|eight|nine|ten) times"
_WORDS = re.compile(
    rf"\b(?:(?:{_TIMES})\s+(?:as\s+(?:fast|quick)|faster|quicker|the\s+(?:speed|throughput|rate|time|memory))|"
    r"(?:doubl|tripl|halv|quarter)(?:es?|ed|ing|s)\s+the\s+(?:speed|throughput|rate|time|memory))",
    re.IGNORECASE,
)
"""A figure in words, which no record can hold: it is to be said in digits."""
_EMPHASIS = re.compile(r"\*\*|[`]")

_BOARD = re.compile(r"(\d+)GB")
"""The memory that a board is named after."""


def claims(text: str) -> list[tuple[str, str]]:
    """The figures of performance in a text, whatever emphasises them: (number with its unit, kind)."""
    text = _EMPHASIS.sub("", text)
    found = [(match[0], "words") for match in _WORDS.finditer(text)]
    found += [(match["number"], "ratio") for match in _FACTOR.finditer(text)]
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
        "words": [],
        "ns": [step.us * 1e3 for step in steps],
        "us": [step.us for step in steps],
        "ms": [step.us / 1e3 for step in steps],
        "seconds": [step.us / 1e6 for step in steps],
        "memory": [size / unit for size in memory for unit in (2**30, 1e9)],
        "bandwidth": [rate["bytes_per_s"] / unit for rate in rates for unit in (1e12, 1e9)],
        "matrix": [rate["flops_per_s"] / unit for rate in rates for unit in (1e12, 1e9, 1e15)],
    }
    return [claim for claim, kind in claims(text) if not _is_held(claim, held[kind])]


def _is_held(claim: str, values: list[float]) -> bool:
    number = re.match(r"[\d,_'.]+(?:e\d+)?", claim)
    if number is None:
        return False
    digits = re.sub("[,_']", "", number[0]).rstrip(".")
    decimals = len(digits.partition("e")[0].partition(".")[2])
    return any(round(value, decimals) == float(digits) for value in values)
