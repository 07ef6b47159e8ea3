"""The command behind ``scripts/report``: the README's table, a page and pictures; or the tables of one folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import figures, harness, page, plots, records
from .device import ROOT
from .page import LIMIT, table


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


def ruled(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of the tune stage's passes over memory: the tile that the rule takes, and the fastest."""
    for item, r in document["results"].items():
        if r.get("rule") and r["rule"] not in r["wrong"]:
            heats = {tile: us for tile, us in r["heats_us"].items() if tile not in r["wrong"]}
            best = min(heats, key=heats.__getitem__)
            yield item, f"{heats[r['rule']]:.1f}", f"{heats[best]:.1f}", f"`{best}`"


OTHER = ("statistics",)
"""Records that no stage makes: taken by hand, for one question."""
SECTIONS = {
    "step": ("Training steps", ("model", "candidate", "images/s", "against the first", "peak GiB", "spread"), steps),
    "baselines": ("Baselines", ("model", "candidate", "images/s", "against the first", "peak GiB", "spread"), steps),
    "autotune": ("Max-autotune", ("model", "candidate", "images/s", "against the first", "peak GiB", "spread"), steps),
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
    results = {
        stage: document for stage, document in found.items() if document and isinstance(document.get("results"), dict)
    }
    if not results:
        raise SystemExit(f"no results in {folder}")
    parts = [environment(results)]
    for stage, (title, head, rows) in SECTIONS.items():
        if stage in results:
            parts.append(f"### {title}\n\n{table(head, list(rows(results[stage])))}")
    over_memory = list(ruled(results["tune"])) if "tune" in results else []
    if over_memory:
        parts.append("### Passes over memory\n\n" + table(("pass", "the rule's, us", "fastest", "tile"), over_memory))
    if "blocks" in results:
        verdicts = results["blocks"]["results"]
        right = sum(bool(r.get("ok")) for r in verdicts.values())
        parts.append(f"### Blocks\n\n{right} of {len(verdicts)} pass the numerics rule.")
    return "\n\n".join(parts) + "\n"


def everything(folder: Path, root: Path, *, pictures: bool = True) -> list[Path]:
    """Writes the README's table, ``docs/measured.md`` and its pictures under ``root``; what changed on disk."""
    readme, written = root / "README.md", root / "docs" / "measured.md"
    if pictures:
        drawn = plots.draw(folder, written.with_suffix(""))
    else:
        drawn = {path.stem for path in written.with_suffix("").glob("*.svg")}
    made = {
        readme: figures.updated(readme.read_text(), records.steps(folder)),
        written: page.page(folder, drawn),
    }
    changed = [path for path, text in made.items() if not path.is_file() or path.read_text() != text]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path])
    return changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report",
        description="Makes the README's table, docs/measured.md and its pictures from benchmarks/records/. "
        "With a folder: prints that record's tables, stage by stage.",
    )
    parser.add_argument("folder", type=Path, nargs="?", help="one record, or the --out of scripts/gpu_check")
    parser.add_argument("--records", type=Path, default=records.FOLDER)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--no-pictures", action="store_true", help="tables alone; needs no matplotlib")
    options = parser.parse_args(argv)
    if options.folder is not None:
        print(report(options.folder), end="")
        return 0
    try:
        changed = everything(options.records, options.root, pictures=not options.no_pictures)
    except ImportError:
        parser.error("pictures need matplotlib (the extra 'train' has it); --no-pictures makes the tables alone")
    for reason in records.passed_over(options.records):
        print(f"passed over: {reason}")
    print("\n".join(f"wrote {path}" for path in changed) or "README.md and docs/measured.md are what the records make")
    held = figures.unheld((options.root / "README.md").read_text(), options.records)
    if held:
        print(f"README.md claims what no record holds: {', '.join(held)}")
    return 1 if held else 0


if __name__ == "__main__":
    raise SystemExit(main())
