"""The benchmarks: those of the host run anywhere; those of a GPU are rehearsed on the CPU, and skip with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step as step_file
from benchmarks import harness, measured, networks, passes, problems, report
from benchmarks.cases import ConvCase
from benchmarks.device import ROOT, DryDevice
from benchmarks.projections import projection_cases
from benchmarks.roles import cases
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import INTERPRETER


class Benchmark:
    """As much of pytest-benchmark's fixture as the benchmarks use."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""

    def pedantic(self, function: Callable[[], object], **rounds: int) -> None:
        function()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "target", lambda: INTERPRETER)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


CASES = [case for layer in problems.layers(50, 2, 32, 8, "float32")[1:4] for case in cases(layer)]
CASES += projection_cases(ConvProblem(2, 7, 6, 16, 32, stride=(2, 2), dtype="float32"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("who", ["ours", "vendor"])
@pytest.mark.parametrize("case", CASES, ids=measured.identify)
def test_a_convolution_s_benchmark(case: ConvCase, who: str) -> None:
    benchmark = Benchmark()
    measured.bench_conv(benchmark, DryDevice(), case, who)
    assert {"bytes", "flops", "floor_us", "device_us", "ratio"} <= set(benchmark.extra_info)
    assert ("error" in benchmark.extra_info) == (who == "ours")
    assert benchmark.group == case.name


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", passes.cases(dry=True), ids=measured.identify)
def test_a_pass_s_benchmark(case: passes.PassCase) -> None:
    benchmark = Benchmark()
    measured.bench_pass(benchmark, DryDevice(), case)
    assert benchmark.extra_info["error"] and benchmark.extra_info["bytes"] > 0


def test_a_step_s_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "fused_resnet", lambda depth, dry: networks.tiny(torch.nn.Identity))
    monkeypatch.setattr(networks, "tiny", lambda block: torch.nn.Sequential(
        torch.nn.Conv2d(3, 10, 3, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ))  # fmt: skip
    benchmark = Benchmark()
    step_file.bench_step(benchmark, DryDevice(), 50, "fused", True)
    assert benchmark.extra_info["images_per_s"] > 0


def test_a_report_of_what_was_measured(tmp_path: Path) -> None:
    timing = {"us": 100.0, "spread": 0.01, "images_per_s": 2560.0, "speedup": 1.5, "peak_bytes": 2**30}
    verdict = {"ours": {"us": 30.0}, "floor_us": 10.0, "ratio": 3.0, "vendor": {"us": 9.0}, "passes_us": 4.0}
    harness.write(tmp_path / "step.json", {"facts": {"gpu": "a GPU"}, "results": {
        "resnet50": {"candidates": {"ours": timing}}, "resnet18": {"error": "it failed"},
    }})  # fmt: skip
    harness.write(tmp_path / "kernels.json", {"results": {"good": verdict, "bad": {"checks": {}, "ok": False}}})
    harness.write(tmp_path / "facts.json", {"results": {}, "ceilings": {"bytes_per_s": 3e12, "flops_per_s": 8e14}})
    text = report.report(tmp_path)
    assert "| resnet50 | ours | 2,560 | 1.50 x | 1.0 | 1.0 % |" in text
    assert "| good | 30 | 10 | 3.00 (!) | 9 + 4 |" in text and "| bad | wrong |" in text
    assert "3.00 TB/s" in text
    with pytest.raises(SystemExit, match="no results"):
        report.report(tmp_path / "nowhere")


@pytest.mark.parametrize("folder", sorted((ROOT / "benchmarks" / "records").glob("*/")), ids=lambda path: path.name)
def test_every_record_makes_a_report(folder: Path) -> None:
    assert report.report(folder).startswith("gpu ")


def test_the_host_s_run_and_the_gpu_s_skip_with_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider",
               "--benchmark-max-time=0.05", "--benchmark-min-rounds=2"]  # fmt: skip
    # As a user's shell: neither interpreted nor, to pytest-benchmark's eyes, a worker of somebody's parallel run.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_XDIST"))
    }
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "a kernel is timed on a GPU, and PyTorch finds none" in run.stdout
    for name in ("bench_plan_conv", "bench_launcher[fprop]", "bench_block[forward and backward]", "bench_explain"):
        assert name in run.stdout
