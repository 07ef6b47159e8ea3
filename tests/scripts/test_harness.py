"""The harness behind scripts/gpu_check: what is wrong is named and passed over, time is kept, the end sums up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness, problems, script
from benchmarks.device import ROOT, DryDevice
from benchmarks.stages import models
from fused_resnet.plan import store, tables, target

pytestmark = pytest.mark.quick


def context(out: Path, seconds: float = 60) -> harness.Context:
    return harness.Context("layers", out, time.time() + seconds, out / "marker", DryDevice())


def test_an_item_that_raises_is_named_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> dict[str, Any]:
        raise ValueError("no such shape")

    def unwanted() -> dict[str, Any]:
        raise AssertionError("measured already")

    first = context(tmp_path)
    assert first.run(iter([("a", wrong), ("b", lambda: {"line": "fine"})])) == 0
    written = json.loads((tmp_path / "layers.json").read_text())["results"]
    assert "ValueError: no such shape" in written["a"]["error"] and written["b"]["line"] == "fine"
    assert "a: FAILED ValueError: no such shape" in capsys.readouterr().out
    again = context(tmp_path)
    assert again.run(iter([("b", unwanted), ("c", dict)])) == 0
    assert set(again.results) == {"a", "b", "c"}


def test_nothing_begins_without_time(tmp_path: Path) -> None:
    late = context(tmp_path, seconds=1)
    assert late.run(iter([("a", dict)])) == 0
    assert not late.results and late.document["out_of_time_before"] == "a"


def test_a_poisoned_device_ends_the_child(tmp_path: Path) -> None:
    def wrong() -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    broken = context(tmp_path)
    broken._alive = lambda: False  # type: ignore[method-assign]
    assert broken.run(iter([("a", wrong), ("b", dict)])) == harness.POISONED
    assert set(broken.results) == {"a"}


CHILD = """
import json, os, sys, time
out, marker = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--marker") + 1]
path = os.path.join(out, "facts.json")
done = json.load(open(path))["results"] if os.path.exists(path) else {}
for name in ("good", "crash", "hang", "last"):
    if name in done:
        continue
    open(marker, "w").write(json.dumps({"item": name, "since": time.time()}))
    if name == "crash":
        os.abort()
    if name == "hang":
        time.sleep(600)
    done[name] = {"line": "fine"}
    json.dump({"stage": "facts", "results": done}, open(path, "w"))
    open(marker, "w").write("")
"""


def test_a_crash_and_a_hang_are_named_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setitem(harness.STAGES, "facts", (1.0, 2))
    real = subprocess.Popen
    monkeypatch.setattr(harness.subprocess, "Popen", lambda c, **kw: real([c[0], str(script), *c[3:]], **kw))
    harness.run_stage("facts", tmp_path, 60)
    results = json.loads((tmp_path / "facts.json").read_text())["results"]
    assert results["good"]["line"] == results["last"]["line"] == "fine"
    assert "status -6" in results["crash"]["error"]
    assert "no answer in 2 s" in results["hang"]["error"]


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.main(["--only", "facts,flops", "--dry"])
    assert "no stage flops" in capsys.readouterr().err


def test_a_measurement_of_no_known_commit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(harness, "commit", lambda: "")
    with pytest.raises(SystemExit):
        harness.main([])
    assert "FUSED_RESNET_COMMIT" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tune", "gpu_check", "report"])
def test_a_python_without_pytorch_is_told_so_in_a_sentence(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", f"scripts/{name}"]  # without site-packages
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(rf"scripts/{name}: this Python .* has no \w+; `scripts/setup bench` .*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage-minutes", "tune=soon"], "--stage-minutes is a list like baselines=2,tune=5, not tune=soon"),
        (["--stage-minutes", "tuned=3"], "no stage tuned; there are facts, "),
        (["--out", str(Path(__file__))], "no folder for results: "),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "run_stage", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(SystemExit):
        harness.main(["--dry", *arguments], prog="tune")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"tune: error: {said}")


def test_a_command_that_is_stopped_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "a_command", SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as stopped:
        script.run("a_command", "a_command")
    assert stopped.value.code == 130 and capsys.readouterr().err == "\nscripts/a_command: stopped\n"


class TestTenMinutes:
    def test_the_core_comes_first_and_fits(self) -> None:
        assert tuple(harness.STAGES)[: len(harness.CORE)] == harness.CORE
        assert sum(harness.STAGES[name][0] for name in harness.CORE) <= 9.5
        for name in set(harness.STAGES) - {"facts", "blocks", "step"}:
            minutes, item_seconds = harness.STAGES[name]
            assert item_seconds <= 60 * minutes, name

    def test_every_model_and_batch_is_compared(self) -> None:
        compared = {(50, 256), (18, 256), *models.MODELS}
        assert compared == {(depth, batch) for depth in (18, 34, 50, 101) for batch in (32, 128, 256)}

    def test_a_stage_prints_before_the_next_begins_and_the_end_sums_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Time that a stage leaves goes to those behind it."""
        rates = {"eager": {"images_per_s": 4000.0}, "ours": {"images_per_s": 8000.0}}

        def run(stage: str, out: Path, seconds: float, **_: Any) -> None:
            results: dict[str, Any] = {"resnet50": {"candidates": rates, "line": "fine"}}
            if stage == "kernels":
                results = {"bad": {"ok": False, "line": "WRONG dz"}, "dead": {"error": "killed"}}
            harness.write(harness.path_of(out, stage), {"results": results})
            print(f"ran {stage} in {seconds:.0f}")

        monkeypatch.setattr(harness, "run_stage", run)
        assert harness.main(["--dry", "--out", str(tmp_path), "--only", "step,kernels,facts"]) == 0
        out = capsys.readouterr().out
        stages = ("facts", "kernels", "step")
        seconds = [60 * sum(harness.STAGES[stage][0] for stage in stages[: i + 1]) for i in range(3)]
        order = [out.index(f"ran {stage} in {most:.0f}") for stage, most in zip(stages, seconds, strict=True)]
        assert order == sorted(order)
        assert "resnet50: eager 4,000, ours 8,000" in out
        assert "kernels: bad: WRONG dz" in out and "kernels: dead: killed" in out

    def test_without_time_a_stage_is_left_out_and_said_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(harness, "run_stage", lambda *_, **__: pytest.fail("it was run"))
        assert harness.main(["--dry", "--out", str(tmp_path), "--only", "autotune", "--minutes", "0.1"]) == 0
        out = capsys.readouterr().out
        assert "[autotune] not run: the time is up" in out and "== left out\nautotune" in out


def test_the_steps_follow_what_was_tuned_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.layers(50)[1].problem
    gpu = replace(target.H100, name="NVIDIA H100 80GB HBM3")
    entry = {"config": {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4}, "us": 1.0, "source": "just now"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(target, "current", lambda device: gpu)
    assert not harness.adopt(tmp_path)
    document = {"version": tables.VERSION, "entries": {tables.problem_key(problem): {"fprop+out": entry}}}
    harness.write(harness.path_of(tmp_path, "tune"), document)
    try:
        assert harness.adopt(tmp_path)
        found = tables.lookup(problem, "fprop+out", gpu)
        assert found is not None and found.source == "just now"
    finally:
        store.forget()


def test_a_damaged_table_is_passed_over_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(target, "current", lambda device: target.H100)
    path = harness.path_of(tmp_path, "tune")
    path.write_text('{"version": 1, "entries"')
    assert not harness.adopt(tmp_path)
    harness.write(path, {"version": tables.VERSION, "entries": {"one": {"fprop": {"config": {"tile": 3}}}}})
    assert not harness.adopt(tmp_path)
    assert "tuned.json is damaged (TypeError" in capsys.readouterr().out
