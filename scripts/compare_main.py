"""The program of scripts/compare, once its environment is there."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from _compare.options import parse  # noqa: E402


def say(line: str) -> None:
    print(line, flush=True)


def choose_device(wanted: str):
    """The device, with Triton's interpreter switched on where there is no GPU: before anything imports Triton."""
    import torch

    if wanted.startswith("cuda"):
        if not torch.cuda.is_available():
            refuse(f"--device {wanted}: PyTorch sees no CUDA GPU here; --device cpu runs without one")
        if int(wanted.partition(":")[2] or 0) >= torch.cuda.device_count():
            refuse(f"--device {wanted}: there are only {torch.cuda.device_count()} GPUs here, counted from 0")
        device = torch.device(wanted)
    elif wanted == "auto" and torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules and interpreted != (device.type == "cpu"):
        os.execv(sys.executable, [sys.executable, *sys.argv])  # this PyTorch brought Triton along: begin again
    return device


def refuse(message: str) -> None:
    print(f"scripts/compare: {message}", file=sys.stderr)
    raise SystemExit(2)


def commit() -> str:
    """The checkout's commit, for the record."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def main(options: argparse.Namespace) -> int:
    started = time.monotonic()
    # Threads that spin while they wait make a busy machine slower by far, and NumPy, in which the interpreter
    # computes, gains nothing from them at these sizes. Read when PyTorch and NumPy are imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    say("scripts/compare: the same ResNet, eagerly, compiled and fused")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {options.out} cannot be made ({error.strerror})")
    device = choose_device(options.device)
    if device.type == "cpu" and options.precision in ("bfloat16", "float16"):
        refuse(f"--precision {options.precision} needs a GPU: without one the kernels run interpreted, in float32")

    import torch
    from _compare.job import Job, JobError
    from _compare.picture import draw
    from _compare.report import table
    from _compare.result import Result
    from data import DataError

    result = Result()
    asked_to_stop = []

    def stop(number, frame):
        asked_to_stop.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        Job(options, device, result, say, stopped=lambda: bool(asked_to_stop)).run()
    except KeyboardInterrupt:
        result.interrupted = True
    except (DataError, JobError) as error:
        refuse(str(error))
    except torch.cuda.OutOfMemoryError:
        refuse(f"the GPU's memory does not hold a batch of {options.batch_size}: use a smaller --batch-size")
    # From here on it is a matter of seconds; a second Ctrl-C should not cost what the first one left.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if result.facts:
        text = table(result)
        say(text)
        (options.out / "compare.txt").write_text(text + "\n")
        record = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "options": {key: str(value) for key, value in vars(options).items()},
            **result.to_dict(),
        }
        (options.out / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(result, options.out / "compare.png")
        spent = time.monotonic() - started
        say(f"picture: {options.out / 'compare.png'}   record: {options.out / 'compare.json'}   took {spent:.0f} s")
    if result.interrupted:
        return 130
    return 1 if result.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse()))
    except KeyboardInterrupt:
        print("\nscripts/compare: stopped before there was anything to show", file=sys.stderr)
        sys.exit(130)
