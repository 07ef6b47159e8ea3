"""scripts/gpu_check and scripts/tune, rehearsed on the CPU: every stage's own code with tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from benchmarks import device, harness, ship
from benchmarks.device import ROOT, DryDevice
from fused_resnet.plan import tables

LIMITS = dict.fromkeys(harness.STAGES, 1) | {"facts": 0, "baselines": 2, "layers": 3, "kernels": 15, "tune": 2}


def gpu_check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/gpu_check", "--dry", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("stage", harness.STAGES)
def test_a_stage_runs_dry(stage: str, tmp_path: Path) -> None:
    run = gpu_check(tmp_path, "--only", stage, "--limit", str(LIMITS[stage]), "--stage-minutes", f"{stage}=8")
    assert run.returncode == 0, run.stderr
    document = json.loads(harness.path_of(tmp_path, stage).read_text())
    assert document["results"], run.stdout + run.stderr
    for name, result in document["results"].items():
        assert "error" not in result, (name, result)
        assert result.get("ok", True), (name, result)
        assert f"[{stage}] {name}: " in run.stdout


def context(out: Path, seconds: float = 60) -> harness.Context:
    return harness.Context("layers", out, time.time() + seconds, out / "marker", DryDevice())


@pytest.mark.quick
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


@pytest.mark.quick
def test_nothing_begins_without_time(tmp_path: Path) -> None:
    late = context(tmp_path, seconds=1)
    assert late.run(iter([("a", dict)])) == 0
    assert not late.results and late.document["out_of_time_before"] == "a"


@pytest.mark.quick
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


@pytest.mark.quick
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


@pytest.mark.quick
def test_the_device_calls_what_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the real Device, on a stand-in that has what ``torch.cuda`` has and nothing else."""
    cuda = create_autospec(torch.cuda)
    properties = cuda.get_device_properties.return_value
    properties.L2_cache_size, properties.name = 50 << 20, "a GPU"
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    real = device.Device()
    real.event().record()
    real.synchronize()
    real.hold(0.001)
    steps: list[int] = []
    real.capture(lambda: steps.append(1))()
    assert len(steps) == 4  # three of warm-up and the captured one
    real.reset_peak()
    real.release()
    for value in (real.allocated(), real.peak()):
        assert value is not None
    facts = real.facts()
    assert facts["gpu"] == "a GPU" and facts["l2_bytes"] == 50 << 20 and facts["torch"] == torch.__version__


@pytest.mark.quick
def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.main(["--only", "facts,flops", "--dry"])
    assert "no stage flops" in capsys.readouterr().err


@pytest.mark.quick
def test_shipping_keeps_what_was_measured_before(tmp_path: Path) -> None:
    entry = {"config": None, "us": None, "vendor_us": 5.0, "passes_us": 0.0, "floor_us": 4.0, "source": "a test"}
    document = {
        "version": tables.VERSION,
        "gpu": "NVIDIA H100 80GB HBM3",
        "facts": {"torch": "2.11", "cpus": 16},
        "results": {"noise": {}},
        "entries": {"one": {"fprop": entry}},
    }
    source = tmp_path / "tuned.json"
    source.write_text(json.dumps(document))
    target = ship.ship(source, tmp_path / "shipped")
    assert target.name == "h100.json"
    document["entries"] = {"one": {"dgrad": entry}, "two": {"fprop": entry}}
    source.write_text(json.dumps(document))
    written = json.loads(ship.ship(source, tmp_path / "shipped").read_text())
    assert {key: sorted(passes) for key, passes in written["entries"].items()} == {
        "one": ["dgrad", "fprop"],
        "two": ["fprop"],
    }
    assert "results" not in written and "cpus" not in written["facts"]
    assert tables.parse(written)["two"]["fprop"].vendor_wins


@pytest.mark.quick
def test_launches_find_their_times_in_the_last_step_of_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.autograd import DeviceType

    from benchmarks.stages import profile
    from fused_resnet.launch.record import Launch

    def event(name: str, start: int, us: float, device: DeviceType = DeviceType.CUDA) -> Any:
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start), device_type=device, device_time_total=us
        )

    recorded = [Launch(name, 0, 3_000_000, {"block_m": 64}) for name in ("a", "b", "a", "elsewhere")]
    events = [event("a", 3, 30.0), event("a", 1, 10.0), event("b", 2, 20.0), event("a", 0, 9.0, DeviceType.CPU)]
    events += [event("a", 13, 31.0), event("a", 11, 11.0), event("b", 12, 21.0), event("elsewhere", 14, 1.0)]
    times = profile._launch_times(SimpleNamespace(events=lambda: events), recorded, steps=2)
    assert times == [11.0, 21.0, 31.0, None]  # the last name came once in two steps: it is not ours alone
    rows = [{**launch._asdict(), "us": us, "floor_us": 1.0} for launch, us in zip(recorded, times, strict=True)]
    profile._print_gaps("ours", rows)
    assert "2 x    21.0 us, floor    1.0 (21.0x)" in capsys.readouterr().out
