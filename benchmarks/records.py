"""What the records hold: the steps, kernels, launches and profiles in ``benchmarks/records/``, the newest of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_resnet.plan.tables import gpu_slug

from . import harness
from .device import ROOT

FOLDER = ROOT / "benchmarks" / "records"
STEP_FILES = ("step.json", "models.json", "baselines.json", "autotune.json")
"""Whole training steps. A file by another name is a state that was left behind, or a question of its own."""


@dataclass(frozen=True)
class Step:
    """A training step of one candidate. ``beside``: images per second of the eager one that took turns with it."""

    gpu: str
    model: str
    batch: int
    dtype: str
    candidate: str
    images_per_s: float
    us: float
    speedup: float
    peak_bytes: int | None
    beside: float
    date: str
    commit: str
    source: str

    @property
    def where(self) -> tuple[str, str, int, str]:
        return self.gpu, self.model, self.batch, self.dtype


@dataclass(frozen=True)
class Kernel:
    """One kernel by itself, beside its floor."""

    gpu: str
    name: str
    us: float
    floor_us: float
    date: str


def documents(folder: Path = FOLDER, pattern: str = "*.json") -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every JSON of every record, in the order of their names, but for what is none (:func:`passed_over`)."""
    for path in sorted(folder.glob(f"*/{pattern}")):
        document = harness.read(path)
        if document is not None and not why_not(document):
            yield path, document


def why_not(document: dict[str, Any] | None) -> str:
    """Why a file is no record, or ""."""
    if document is None:
        return "is damaged"
    for name, kind in (("results", dict), ("facts", dict), ("benchmarks", list), ("rows", list)):
        if not isinstance(document.get(name, kind()), kind):
            return f"is damaged: its {name} are none"
    return "is a rehearsal's, which measures nothing" if document.get("facts", {}).get("dry") else ""


def passed_over(folder: Path = FOLDER) -> list[str]:
    """The files of ``folder`` that are no records, and why."""
    files = {path: why_not(harness.read(path)) for path in sorted(folder.glob("*/*.json"))}
    return [f"{path} {reason}" for path, reason in files.items() if reason]


def _facts(document: dict[str, Any]) -> tuple[str, str, str]:
    facts = document.get("facts", {})
    return gpu_slug(str(facts.get("gpu", "unknown"))), str(facts.get("date", "")), str(facts.get("commit", ""))


def steps(folder: Path = FOLDER) -> list[Step]:
    """Every whole step that was measured, oldest first."""
    found: list[Step] = []
    for name in STEP_FILES:
        for path, document in documents(folder, name):
            found += _stage_steps(path, document)
    for path, document in documents(folder):
        found += _suite_steps(path, document)
    return sorted(found, key=lambda step: step.date)


def _stage_steps(path: Path, document: dict[str, Any]) -> Iterator[Step]:
    """Those of a stage of ``scripts/gpu_check``."""
    gpu, date, commit = _facts(document)
    for item, result in document.get("results", {}).items():
        model = re.match(r"[a-z]+\d+", item)
        candidates = result.get("candidates")
        if model is None or not candidates or not result.get("ok", True):
            continue
        if next(iter(candidates)) != "eager":  # its ratios are to something else
            continue
        first = candidates["eager"]["images_per_s"]
        for name, r in candidates.items():
            dtype = "float16" if "float16" in item else "bfloat16"
            yield Step(gpu, model[0], result["batch"], dtype, name, r["images_per_s"], r["us"], r["speedup"],
                       r.get("peak_bytes"), first, date, commit, f"{path.parent.name}/{path.stem}")  # fmt: skip


def _suite_steps(path: Path, document: dict[str, Any]) -> Iterator[Step]:
    """Those of a ``pytest benchmarks --benchmark-json``."""
    for run in document.get("benchmarks", []):
        info = run.get("extra_info", {})
        shape = re.fullmatch(r"step: ([a-z]+\d+), batch (\d+)", run.get("group") or "")
        if shape is None or "images_per_s" not in info:
            continue
        rate, speedup, gpu = info["images_per_s"], info.get("speedup", 1.0), gpu_slug(str(info.get("gpu", "unknown")))
        yield Step(gpu, shape[1], int(shape[2]), "bfloat16", info["candidate"], rate, info["device_us"], speedup,
                   info.get("peak_bytes"), rate / speedup, str(info.get("date", "")), str(info.get("commit", "")),
                   f"{path.parent.name}/{path.stem}")  # fmt: skip


def newest(found: Iterable[Step]) -> dict[tuple[str, str, int, str], dict[str, Step]]:
    """By what was trained where, the latest figure of each candidate."""
    latest: dict[tuple[str, str, int, str], dict[str, Step]] = {}
    for step in found:
        latest.setdefault(step.where, {})[step.candidate] = step
    return latest


def kernels(folder: Path = FOLDER) -> dict[tuple[str, str], Kernel]:
    """The latest time of every kernel that was right, by GPU and name."""
    found: list[Kernel] = []
    for path, document in documents(folder):
        gpu, date, _ = _facts(document)
        for name, r in document.get("results", {}).items() if path.name in ("kernels.json", "tuned.json") else ():
            entry = r.get("entry") or {"us": r.get("ours", {}).get("us"), "floor_us": r.get("floor_us")}
            if entry.get("us") and entry.get("floor_us"):
                found.append(Kernel(gpu, name, entry["us"], entry["floor_us"], date))
    return {(kernel.gpu, kernel.name): kernel for kernel in sorted(found, key=lambda kernel: kernel.date)}


def ceilings(folder: Path = FOLDER) -> dict[str, dict[str, float]]:
    """Copy bandwidth and matrix rate as measured, by GPU."""
    return {_facts(document)[0]: document["ceilings"] for _, document in documents(folder, "facts.json")
            if document.get("ceilings")}  # fmt: skip


def profiles(folder: Path = FOLDER) -> dict[tuple[str, str], dict[str, Any]]:
    """The latest profile of a step, by GPU and item ("resnet50 ours")."""
    found = []
    for _, document in documents(folder, "profile.json"):
        gpu, date, _ = _facts(document)
        found += [(date, gpu, item, r) for item, r in document["results"].items() if r.get("rows")]
    return {(gpu, item): r for _, gpu, item, r in sorted(found, key=lambda one: one[0])}


def launches(folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """The latest step that was timed launch by launch, by GPU: kernel, us, bytes, flops."""
    found = []
    for _, document in documents(folder):
        gpu, date, _ = _facts(document)
        rows = document.get("rows") or [
            row for item, r in document.get("results", {}).items() if item == "resnet50 ours"
            for row in r.get("launches", [])
        ]  # fmt: skip
        rows = [row for row in rows if row.get("us")]
        if rows:
            found.append((date, gpu, rows))
    return {gpu: rows for _, gpu, rows in sorted(found, key=lambda one: one[0])}
