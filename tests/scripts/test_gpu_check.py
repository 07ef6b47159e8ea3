"""scripts/gpu_check and scripts/tune, rehearsed on the CPU: every stage's own code with tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import create_autospec

import pytest
import torch

import fused_resnet as fr
from benchmarks import device, harness, networks, precompile, problems, ship
from benchmarks.device import ROOT, DryDevice
from benchmarks.roles import cases
from benchmarks.stages import autotune, baselines, blocks, kernels, models, step
from fused_resnet.plan import tables, target


def gpu_check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/gpu_check", "--dry", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 15], ids=["the first item of most stages", "facts, many kernels and layers"])
def test_every_stage_runs_dry(limit: int, tmp_path: Path) -> None:
    """One call, as on a GPU: each stage prints what it found before the next begins, and the end sums up."""
    stages = [stage for stage in harness.STAGES if (stage in ("facts", "kernels", "layers")) == (limit > 1)]
    run = gpu_check(tmp_path, "--only", ",".join(stages), "--limit", str(limit), "--minutes", "30")
    assert run.returncode == 0, run.stderr
    for stage in stages:
        document = json.loads(harness.path_of(tmp_path, stage).read_text())
        assert document["results"], run.stdout + run.stderr
        for name, result in document["results"].items():
            assert "error" not in result, (name, result)
            assert result.get("ok", True), (name, result)
            assert f"[{stage}] {name}: " in run.stdout
    begun = [run.stdout.index(f"[{stage}] up to") for stage in stages]
    assert begun == sorted(begun)
    assert "== wrong or failed\nnothing\n== left out\nnothing" in run.stdout
    assert ("== images/s, of a rehearsal, which measures nothing\nresnet50: eager" in run.stdout) == (limit == 1)


def context(out: Path, stage: str, device: DryDevice | None = None) -> harness.Context:
    return harness.Context(stage, out, time.time() + 60, out / "marker", device or DryDevice())


class Pretended(DryDevice):
    """The CPU again, for what only a GPU's run does: nothing but the size of the work and its kernels is replaced."""

    dry = False


class Compiled:
    """In place of the processes that compile ahead: everything is done, nothing was wrong."""

    jobs: ClassVar[list[Any]] = []

    def __init__(self, jobs: Any, capability: int) -> None:
        Compiled.jobs[:] = jobs

    def wait(self, case: Any, config: Any, timeout: float = 40) -> str:
        return ""

    def stop(self) -> None:
        pass


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models and images where a GPU's run has ResNets; what compiles gives back what it was given."""
    build = networks.tiny
    monkeypatch.setattr(networks, "tiny_or", lambda dry, batch, size: (2, 32))
    monkeypatch.setattr(networks, "torchvision_resnet", lambda depth, dry: build(fr.reference.Bottleneck))
    monkeypatch.setattr(networks, "fused_resnet", lambda depth, dry: build(fr.Bottleneck))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(fr, "warmup", create_autospec(fr.warmup))
    monkeypatch.setattr(step, "target_of", lambda context: target.H100)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("stage", [step, models, baselines, autotune], ids=lambda stage: stage.__name__[18:])
def test_what_only_a_gpu_s_run_does(stage: Any, tmp_path: Path) -> None:
    """Warming up, autocast, explaining, the last items of a stage: what ``--dry`` passes over."""
    found = context(tmp_path, stage.__name__[18:], Pretended())
    listed = list(stage.items(found))
    assert found.run([listed[0], listed[-1]]) == 0
    for name, result in found.results.items():
        assert "error" not in result and result.get("ok", True), (name, result)
    if stage is step:
        plan = found.results["resnet50"]["plan"]
        assert plan["rows"] and {"route", "reason", "projected_us"} <= set(plan["rows"][0])
        assert f"| projected {plan['projected'].middle:.0f}/s" in found.results["resnet50"]["line"]
        assert fr.warmup.call_args.args[1:] == ((256, 3, 224, 224), torch.bfloat16)  # type: ignore[attr-defined]


def test_kernels_of_both_dtypes_are_compiled_ahead_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = problems.layers(50, 2, 32, 8)[1:2]
    passes = [replace(case, dtype_name="bfloat16") for case in kernels.passes.cases(dry=True)[2:3]]
    monkeypatch.setattr(kernels.problems, "layers", lambda depth: layers)
    monkeypatch.setattr(kernels.passes, "cases", lambda dry: passes)
    monkeypatch.setattr(kernels, "Ahead", Compiled)
    monkeypatch.setattr(kernels, "target_of", lambda context: target.INTERPRETER)
    found = context(tmp_path, "kernels", Pretended())
    assert found.run(kernels.items(found)) == 0
    kernels.finish(found)
    assert len(found.results) == 1 + len(cases(layers[0])) and not found.document["wrong"], found.document["wrong"]
    assert all(set(r["checks"]) == {"bfloat16", "float16"} and "ours" in r for r in found.results.values())
    assert {case.dtype for case, _ in Compiled.jobs} == {torch.bfloat16, torch.float16}


def test_a_wrong_kernel_is_named_and_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"out": {"ok": False, "failed": "R", "rms": 0.3}}
    monkeypatch.setattr(kernels.passes.PassCase, "check", lambda *_: wrong)
    monkeypatch.setattr(kernels, "interleave", lambda *_, **__: pytest.fail("it was timed"))
    found = context(tmp_path, "kernels")
    assert found.run([next(iter(kernels.items(found)))]) == 0
    kernels.finish(found)
    (name,) = found.results
    assert found.document["wrong"] == [name] and "ours" not in found.results[name]
    assert f"{name}: WRONG float32 out R" in capsys.readouterr().out


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("dry", [True, False])
def test_a_rehearsed_block_is_judged_over_several_draws(dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients have four values each. A real one is drawn once; and what is wrong in each draw is named."""
    draw, seeds = blocks._draw, []

    def off(device: DryDevice, seed: int, *shape: Any) -> Any:
        (candidate, *runs), ran = draw(device, seed, *shape)
        seeds.append(seed)
        return [{**candidate, "dgamma0": candidate["dgamma0"] * (1 + wrong)}, *runs], ran

    monkeypatch.setattr(blocks, "_draw", off)
    monkeypatch.setattr(blocks, "BATCH", 2)
    device = DryDevice() if dry else Pretended()
    shape = "ConvBNReLU", 4, 4, 1, 6, torch.float32
    wrong = 0.0
    assert blocks.judge(device, *shape)["ok"]
    assert seeds == ([1, 2, 3, 4] if dry else [1])
    wrong = 1e-5
    verdict = blocks.judge(device, *shape)
    assert not verdict["ok"] and verdict["line"].startswith("WRONG dgamma0 R: ")


def test_kernels_compile_ahead_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real processes: one kernel for a Hopper, and one whose compilation fails in words."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = cases(problems.layers(50, 2)[1])[0]
    good = case.candidates(target.H100)[0]
    bad = replace(good, block_m=48)
    ahead = precompile.Ahead([(case, good), (case, bad)], 90, workers=1)
    try:
        assert ahead.wait(case, good, timeout=120) == "" and list(tmp_path.iterdir())
        assert ahead.wait(case, bad, timeout=60) != ""
    finally:
        ahead.stop()


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
def test_shipping_keeps_what_was_measured_before(tmp_path: Path) -> None:
    entry = {"config": None, "us": None, "vendor_us": 5.0, "passes_us": 0.0, "floor_us": 4.0, "source": "a test"}
    document = {
        "version": tables.VERSION,
        "gpu": "NVIDIA H100 80GB HBM3",
        "facts": {"torch": "2.11", "cpus": 16, "commit": "abc"},
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
