"""Runs the stages of a check: each in a process of its own, each item written down as soon as it is done.

The parent starts one child per stage and watches it. An item that raises is named and skipped by the child. One that
kills the process or poisons the device, or that hangs, is named by the parent, which starts the child again: it goes on
after the items that are already in the stage's JSON. That is also how an interrupted check goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .device import ROOT, Device, DryDevice, commit

STAGES = {
    "facts": (1.0, 40),
    "blocks": (1.5, 60),
    "kernels": (2.0, 90),
    "tune": (2.5, 90),
    "step": (1.0, 100),
    "models": (1.5, 60),
    "baselines": (1.5, 80),
    "profile": (1.0, 60),
    "routes": (1.0, 40),
    "autotune": (5.0, 280),
    "layers": (1.0, 40),
}
"""In order of value: how many minutes a stage may take (and what those before it left), after how many seconds an item
of it is given up."""
CORE = ("facts", "blocks", "kernels", "tune", "step", "models")
"""What is right, the table, and with it the end-to-end comparison: what ten minutes are for. The others have what these
leave, and a second call."""
Item = tuple[str, Callable[[], dict[str, Any]]]
POISONED = 3
DEFAULT_CEILINGS = {"bytes_per_s": 3.0e12, "flops_per_s": 750e12}


class Context:
    """What a stage sees: the device, where results go, how much time is left."""

    def __init__(self, stage: str, out: Path, deadline: float, marker: Path, device: Device, limit: int = 0) -> None:
        self.stage, self.out, self.deadline, self.marker, self.device, self.limit = (
            stage, out, deadline, marker, device, limit)  # fmt: skip
        self.path = path_of(out, stage)
        before = read(self.path) or {}
        self.document = before if isinstance(before.get("results"), dict) else {"stage": stage, "results": {}}
        self.document.pop("out_of_time_before", None)
        self.document["facts"] = {**(read(out / "facts.json") or {}).get("facts", {}), **device.facts()}

    @property
    def dry(self) -> bool:
        return self.device.dry

    @property
    def results(self) -> dict[str, Any]:
        return self.document["results"]

    def remaining(self) -> float:
        return self.deadline - time.time()

    @property
    def ceilings(self) -> dict[str, float]:
        """The measured ceilings of this GPU; an H100's where the facts stage has not run."""
        return {**DEFAULT_CEILINGS, **((read(self.out / "facts.json") or {}).get("ceilings") or {})}

    def save(self) -> None:
        write(self.path, self.document)

    def run(self, items: Iterable[Item]) -> int:
        """Runs what is not done yet; returns the child's exit status."""
        for name, work in items:
            if name in self.results:
                continue
            if self.remaining() < 2:
                print(f"[{self.stage}] out of time before {name}", flush=True)
                self.document["out_of_time_before"] = name
                self.save()
                return 0
            self.marker.write_text(json.dumps({"item": name, "since": time.time()}))
            start, poisoned = time.time(), False
            try:
                result = work()
            except Exception as error:
                result = failure(error)
                poisoned = not self._alive()
            result["seconds"] = round(time.time() - start, 2)
            self.results[name] = result
            self.save()
            self.marker.write_text("")
            show(self.stage, name, result)
            if poisoned:
                return POISONED
            self.device.release()
            if self.limit and len(self.results) >= self.limit:
                return 0
        return 0

    def _alive(self) -> bool:
        try:
            self.device.synchronize()
            self.device.release()
        except Exception:
            return False
        return True


def path_of(out: Path, stage: str) -> Path:
    """A stage's file. The tune stage's is a table as it stands."""
    return out / ("tuned.json" if stage == "tune" else f"{stage}.json")


def failure(error: BaseException) -> dict[str, Any]:
    """An item that raised, as its result."""
    text = str(error).strip() or repr(error)
    return {
        "error": f"{type(error).__name__}: {text[:2000]}",
        "traceback": "".join(traceback.format_exception(error))[-4000:],
    }


def show(stage: str, name: str, result: dict[str, Any]) -> None:
    """One short line, before the next item begins."""
    text = result.get("line") or (f"FAILED {result['error'].splitlines()[0][:160]}" if "error" in result else "done")
    print(f"[{stage}] {name}: {text}  ({result.get('seconds', 0):.1f} s)", flush=True)


def read(path: Path) -> dict[str, Any] | None:
    """What ``write`` wrote there; None where nothing is, or something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, document: dict[str, Any]) -> None:
    """Atomically: a reader or a kill never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(document, indent=1, default=str))
    partial.replace(path)


def adopt(out: Path) -> bool:
    """Plans of this process follow what was tuned in ``out``, where anything was."""
    import torch

    from fused_resnet.plan import store, tables, target

    tuned = read(path_of(out, "tune"))
    found = target.current(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    if not tuned or not tuned.get("entries") or found is None:
        return False
    store.load()  # first: what is installed later goes before it
    try:
        tables.install(found.name, found.sm, tuned)
    except tables.DAMAGED as error:
        print(f"{path_of(out, 'tune')} is damaged ({type(error).__name__}: {error}): the shipped tables are followed")
        return False
    return True


def child(arguments: argparse.Namespace) -> int:
    """One stage, in this process."""
    device = DryDevice() if arguments.dry else Device()
    context = Context(arguments.stage, arguments.out, arguments.deadline, arguments.marker, device, arguments.limit)
    context.document["tuned"] = not arguments.dry and adopt(arguments.out)
    stage = importlib.import_module(f"benchmarks.stages.{arguments.stage}")
    status = context.run(stage.items(context))
    finish = getattr(stage, "finish", None)
    if status == 0 and finish is not None:
        finish(context)
        context.save()
    return status


def run_stage(stage: str, out: Path, seconds: float, *, dry: bool = False, limit: int = 0) -> None:
    """One stage in children of its own, within ``seconds``."""
    item_seconds = STAGES[stage][1]
    deadline = time.time() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch) / "running"
        for _ in range(12):
            if deadline - time.time() < 4:
                break
            marker.write_text("")
            command = [sys.executable, "-m", "benchmarks.harness", stage, "--out", str(out), "--marker", str(marker),
                       "--deadline", str(deadline), "--limit", str(limit)] + ["--dry"] * dry  # fmt: skip
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
            # A record speaks of the shipped tables and of what this check tuned, not of what lies in somebody's cache.
            environment["FUSED_RESNET_CACHE_DIR"] = str(out / "cache")
            if dry:
                environment["TRITON_INTERPRET"] = "1"
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            try:
                problem = _watch(process, marker, deadline, item_seconds)
            finally:
                _end(process)
            if problem is None:
                break
            running = read(marker)
            if running:
                result = {"error": problem, "seconds": round(time.time() - running["since"], 1)}
                document = read(path_of(out, stage)) or {"stage": stage, "results": {}}
                document["results"][running["item"]] = result
                write(path_of(out, stage), document)
                show(stage, running["item"], result)
            elif problem != POISONED_TEXT:
                print(f"[{stage}] {problem}; the stage is left", flush=True)
                break


POISONED_TEXT = "the device was left unusable"


def _watch(process: subprocess.Popen[bytes], marker: Path, deadline: float, item_seconds: float) -> str | None:
    """Waits for a child; says what went wrong, or ``None``."""
    while (status := process.poll()) is None:
        time.sleep(0.1)
        now = time.time()
        since = (read(marker) or {}).get("since", math.inf)
        if now - since > item_seconds:
            return f"no answer in {item_seconds} s: killed"
        if now > deadline + 20:
            return "over the stage's time: killed"
    if status == 0:
        return None
    return POISONED_TEXT if status == POISONED else f"the process ended with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a child and what it started (compile workers), by its own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: list[str] | None = None, prog: str = "gpu_check") -> int:
    """The command line of ``scripts/gpu_check``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Everything worth knowing about this GPU in ten minutes: facts, baselines, every kernel's error, "
        "its time, whole steps, a profile. Results are written as they come; run again to go on.",
        epilog="Stages, in order of value: " + ", ".join(STAGES),
    )
    parser.add_argument("--only", default=",".join(STAGES), help="stages to run, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_check", help="folder for one JSON per stage")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--stage-minutes", default="", help="override budgets: baselines=2,tune=5")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already in --out")
    parser.add_argument("--limit", type=int, default=0, help="at most so many items a stage (0: all)")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU with tiny shapes; measures nothing")
    options = parser.parse_args(argv)
    chosen = [name.strip() for name in options.only.split(",") if name.strip()]
    try:
        budgets = {
            name: float(m) for name, _, m in (part.partition("=") for part in options.stage_minutes.split(",")) if m
        }
    except ValueError:
        parser.error(f"--stage-minutes is a list like baselines=2,tune=5, not {options.stage_minutes}")
    unknown = sorted((set(chosen) | set(budgets)) - set(STAGES))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    import torch

    if not options.dry and not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch sees; --dry rehearses on the CPU")
    if not options.dry and not commit():
        parser.error("a record has to name the commit that was measured, and this is no git checkout: "
                     "name it by FUSED_RESNET_COMMIT=<commit>")  # fmt: skip
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"no folder for results: {options.out} ({error.strerror})")
    until = time.time()
    end = until + options.minutes * 60
    for name in [stage for stage in STAGES if stage in chosen]:
        if options.fresh:
            path_of(options.out, name).unlink(missing_ok=True)
        minutes = budgets.get(name, STAGES[name][0])
        until = max(until, time.time()) + minutes * 60  # what a stage leaves, the next ones may use
        seconds = min(until, end) - time.time()
        if seconds < 10:
            print(f"[{name}] not run: the time is up", flush=True)
            continue
        start = time.time()
        print(f"[{name}] up to {seconds:.0f} s", flush=True)
        run_stage(name, options.out, seconds, dry=options.dry, limit=options.limit)
        print(f"[{name}] {time.time() - start:.0f} s", flush=True)
    summarise(options.out, chosen, dry=options.dry)
    return 0


def summarise(out: Path, stages: Iterable[str], *, dry: bool = False) -> None:
    """The last lines: what is wrong, what each whole step reached, what was left out."""
    wrong, left, steps = [], [], []
    for name in STAGES:
        if name not in stages:
            continue
        document = read(path_of(out, name))
        if document is None:
            left.append(name)
            continue
        if "out_of_time_before" in document:
            left.append(f"{name} from {document['out_of_time_before']} on")
        for item, r in document.get("results", {}).items():
            if "error" in r or r.get("ok") is False:
                wrong.append(f"{name}: {item}: {r.get('line') or r['error'].splitlines()[0]}"[:160])
            rates = {who: c["images_per_s"] for who, c in r.get("candidates", {}).items() if "images_per_s" in c}
            if rates:
                steps.append(f"{item}: {', '.join(f'{who} {rate:,.0f}' for who, rate in rates.items())}")
    print(
        "== images/s"
        + ", of a rehearsal, which measures nothing" * dry
        + "\n"
        + ("\n".join(steps) or "no step was timed")
    )
    print("== wrong or failed\n" + ("\n".join(wrong) or "nothing"))
    print(f"== left out\n{', '.join(left) or 'nothing'}")
    print(f"scripts/report {out} prints the tables; the same command goes on where it was", flush=True)


def _child_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--marker", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(child(_child_arguments()))
