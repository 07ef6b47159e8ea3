#!/usr/bin/env python3
"""Writes the tables of timm's ResNets in docs/bring_your_model.md: what ``fr.convert`` does with each of them.

Models are made on the meta device, so it takes seconds and downloads nothing. Run it again after a change of the
families' descriptions or with another timm.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import timm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fused_resnet as fr  # noqa: E402

PAGE = ROOT / "docs" / "bring_your_model.md"
MODULES = ("resnet", "res2net", "sknet", "resnest")
BEGIN, END = "<!-- timm:begin -->", "<!-- timm:end -->"


def counted(words: Iterable[str]) -> str:
    return "; ".join(f"{count} × {word}" for word, count in Counter(words).most_common())


def row(name: str) -> str:
    """The model's line: what the report says of its stem and of its blocks."""
    report = fr.convert(timm.create_model(name, device="meta"))
    said = {module: f"kept: {reason}" for module, reason in report.kept} | dict(report.converted)
    return f"| `{name}` | {said.pop('')} | {counted(said.values())} |"


def table() -> str:
    """``resnet.py``'s models, and those of the files whose blocks make the same network."""
    parts = []
    for module in MODULES:
        names = timm.list_models(module=module)
        head = f"All {len(names)} models of `timm/models/{module}.py` in timm {timm.__version__}:"
        parts.append("\n".join([head, "", "| model | stem | blocks |", "|---|---|---|", *map(row, names)]))
    return "\n\n".join(parts)


def updated(page: str) -> str:
    """``page`` with the table between its markers made anew. ValueError: it has no markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(updated(PAGE.read_text()))
