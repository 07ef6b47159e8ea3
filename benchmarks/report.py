"""Markdown tables of a folder of results: ``python -m benchmarks.report benchmarks/records/<folder>``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import harness

LIMIT = 1.5
"""A kernel over this many times its floor is named."""


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def environment(results: dict[str, dict[str, Any]]) -> str:
    """Where the figures were taken, and the ceilings that floors are made of."""
    facts = next(iter(results.values())).get("facts", {})
    keys = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "date")
    text = ", ".join(f"{key} {facts[key]}" for key in keys if facts.get(key))
    ceilings = results.get("facts", {}).get("ceilings")
    if ceilings:
        copy, rate = ceilings["bytes_per_s"] / 1e12, ceilings["flops_per_s"] / 1e12
        text += f". Copy {copy:.2f} TB/s, matrix products {rate:.0f} TFLOP/s"
    return text + "."


def steps(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Whole training steps; the ratios are those of candidates that took turns in one process."""
    for item, result in document["results"].items():
        for name, r in result.get("candidates", {}).items():
            peak = f"{r['peak_bytes'] / 2**30:.1f}" if r.get("peak_bytes") else ""
            spread = f"{100 * r['spread']:.1f} %"
            yield item, name, f"{r['images_per_s']:,.0f}", f"{r['speedup']:.2f} x", peak, spread


def kernels(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, r in document["results"].items():
        if "ours" in r:
            vendor = f"{r['vendor']['us']:.0f} + {r['passes_us']:.0f}" if "vendor" in r else ""
            flag = " (!)" if r["ratio"] > LIMIT else ""
            yield name, f"{r['ours']['us']:.0f}", f"{r['floor_us']:.0f}", f"{r['ratio']:.2f}{flag}", vendor
        else:
            yield name, "wrong" if "checks" in r else "failed", "", "", ""


def layers(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, r in document["results"].items():
        passes = r.get("passes", {})
        yield (
            name,
            *(f"{passes[k]['us']:.0f}" if k in passes else "" for k in ("fprop", "dgrad", "wgrad")),
            (f"{r['floor_us']:.0f} ({r['limit']})" if passes else "failed"),
        )


def tuned(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, r in document["results"].items():
        entry = r.get("entry")
        if entry is None:
            continue
        ours = entry["us"] or float("inf")
        vendor, passes = entry["vendor_us"], entry["passes_us"]
        # On the Gram route the vendor has no convolution to offer.
        theirs = "" if vendor is None else f"{vendor:.0f} + {passes:.0f}"
        winner = "ours" if vendor is None or ours <= vendor + passes else "the vendor's"
        yield name, f"{ours:.0f}", theirs, f"{entry['floor_us']:.0f}", winner


def profile(document: dict[str, Any], most: int = 15) -> Iterator[tuple[str, ...]]:
    for item, result in document["results"].items():
        for r in result.get("rows", [])[:most]:
            floor = f"{r['us'] / r['floor_us']:.2f}" if r.get("floor_us") else ""
            share = f"{100 * r['us'] / result['busy_us']:.1f} %"
            yield item, f"`{r['kernel'][:60]}`", f"{r['calls']:.0f}", f"{r['us']:,.0f}", share, floor


def routes(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Blocks, forward and backward; the ratio is to eager, which took turns with the routes."""
    for item, result in document["results"].items():
        timings = result.get("candidates", {})
        for name, r in timings.items():
            yield item, name, f"{r['us']:,.0f}", f"{timings['eager']['us'] / r['us']:.2f} x"


def candidates(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for item, r in document["results"].items():
        best = min(r["candidates_us"], key=r["candidates_us"].__getitem__)
        yield item, f"{r['floor_us']:.1f}", f"{r['shipped_us']:.1f}", f"{r['candidates_us'][best]:.1f} ({best})"


OTHER = ("statistics",)
"""Records that no stage makes: taken by hand, for one question."""
SECTIONS = {
    "step": ("Training steps", ("model", "candidate", "images/s", "against the first", "peak GiB", "spread"), steps),
    "baselines": ("Baselines", ("model", "candidate", "images/s", "against the first", "peak GiB", "spread"), steps),
    "tune": ("Tuned convolutions", ("pass", "ours, us", "vendor + passes", "floor", "faster"), tuned),
    "kernels": ("Kernels", ("kernel", "us", "floor", "x floor", "vendor + passes"), kernels),
    "layers": ("The vendor's convolutions", ("layer", "fprop, us", "dgrad", "wgrad", "floor"), layers),
    "models": ("Other models and batches", ("model", "candidate", "images/s", "x first", "peak GiB", "spread"), steps),
    "routes": ("Blocks by route", ("block", "candidate", "us", "x eager"), routes),
    "statistics": ("Statistics", ("kernel", "floor, us", "shipped", "fastest"), candidates),
    "profile": ("Profile", ("model", "kernel", "calls", "us a step", "share", "x floor"), profile),
}


def report(folder: Path) -> str:
    """All that is in the folder."""
    found = {stage: harness.read(harness.path_of(folder, stage)) for stage in (*harness.STAGES, *OTHER)}
    results = {stage: document for stage, document in found.items() if document}
    if not results:
        raise SystemExit(f"no results in {folder}")
    parts = [environment(results)]
    for stage, (title, head, rows) in SECTIONS.items():
        if stage in results:
            parts.append(f"### {title}\n\n{table(head, rows(results[stage]))}")
    if "blocks" in results:
        verdicts = results["blocks"]["results"]
        right = sum(bool(r.get("ok")) for r in verdicts.values())
        parts.append(f"### Blocks\n\n{right} of {len(verdicts)} pass the numerics rule.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=Path)
    print(report(parser.parse_args(argv).folder), end="")


if __name__ == "__main__":
    main()
