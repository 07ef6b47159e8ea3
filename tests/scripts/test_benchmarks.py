"""The benchmarks: those of the host run anywhere; those of a GPU are rehearsed on the CPU, and skip with a reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from benchmarks import measured, modules, passes, problems, registry
from benchmarks.cases import ConvCase
from benchmarks.device import ROOT, DryDevice
from benchmarks.projections import projection_cases
from benchmarks.registry import Entry
from benchmarks.roles import cases
from fused_resnet.explain import image_like
from fused_resnet.launch.record import Rehearsed, rehearse_launches
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import H100, INTERPRETER, Assumption, assume
from fused_resnet.rehearsal import rehearse
from tests.scripts.fake_cudnn import FakeCudnn, FakeTensor


class Benchmark:
    """As much of pytest-benchmark's fixture as the benchmarks use."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.timed = False

    def pedantic(self, function: Callable[[], object], **rounds: int) -> None:
        function()
        self.timed = True


DRY = measured.Machine(DryDevice(), INTERPRETER, {"gpu": "none"})
CASES = [case for layer in problems.layers(50, 2, 32, 8, "float32")[1:4] for case in cases(layer)]
CASES += projection_cases(ConvProblem(2, 7, 6, 16, 32, stride=(2, 2), dtype="float32"))
HALF = [replace(c, problem=replace(c.problem, dtype="float16")) for c in CASES if c.gram and c.kind != "fprop"]


def bench(subject: Any, candidate: str, level: str = "kernel") -> Benchmark:
    """One benchmark, rehearsed."""
    benchmark = Benchmark()
    measured.bench(benchmark, DRY, Entry(level, subject, (candidate,), "none"), candidate)
    return benchmark


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("who", ["ours", "vendor"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_convolution_s_benchmark(case: ConvCase, who: str) -> None:
    benchmark = bench(case, who)
    assert {"bytes", "flops", "floor_us", "device_us", "fraction_of_floor", "gpu"} <= set(benchmark.extra_info)
    assert ("error" in benchmark.extra_info) == ("speedup" in benchmark.extra_info) == (who == "ours")
    assert benchmark.group == f"kernel: {case.name}" and benchmark.timed


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_the_gram_route_in_float16(case: ConvCase) -> None:
    assert bench(case, "ours").timed


FLAGS = {"HAS_AFFINE", "HAS_PIVOT", "SEEN", "HAS_MEAN", "HAS_MEANS", "HAS_SCALES", "TERMS", "BLOCK_N", "BLOCK_K"}


def flags(run: Callable[[Callable[[Rehearsed], object]], object]) -> set[tuple[str, frozenset[Any]]]:
    """Of the Gram route's own kernels that ``run`` would launch."""
    found: set[tuple[str, frozenset[Any]]] = set()

    def seen(launch: Rehearsed) -> None:
        name = launch.kernel.fn.__name__
        if name in ("gram_kernel", "gram_wgrad_kernel", "gram_dgrad_kernel"):
            found.add((name, frozenset((k, v) for k, v in launch.arguments.items() if k in FLAGS)))

    run(seen)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_gram_route_s_cases_launch_what_a_block_does(dtype: str) -> None:
    """With the pivots, means, scales and configurations that the planner gives to this dtype."""
    block = fr.Bottleneck(128, 64, 1, nn.Sequential(nn.Conv2d(128, 256, 1, bias=False), nn.BatchNorm2d(256)))
    model = nn.Sequential(nn.Conv2d(3, 128, 1), block).to("meta", memory_format=torch.channels_last)

    def step(seen: Callable[[Rehearsed], object]) -> None:
        x = image_like((4, 3, 14, 14), getattr(torch, dtype))
        with assume(Assumption(H100)), fr.use_route("gram"):
            rehearse(model, [x], getattr(torch, dtype), True, on_kernel=seen)

    launched = flags(step)
    last = problems.Layer(ConvProblem(4, 14, 14, 64, 256, dtype=dtype), "conv3", 1, True)
    for case in (*cases(last), *projection_cases(ConvProblem(4, 14, 14, 128, 256, dtype=dtype))):
        if (not case.gram and case.kind != "gram") or case.kind == "fprop":
            continue

        def run(seen: Callable[[Rehearsed], object], case: ConvCase = case) -> None:
            with rehearse_launches():
                t = case.inputs("meta", empty=True)
            with rehearse_launches(seen):
                case.ours(t, case.candidates(H100)[0])

        assert flags(run) <= launched, case.name


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("case", passes.cases(dry=True), ids=lambda case: case.name)
def test_a_pass_s_benchmark(case: passes.PassCase) -> None:
    benchmark = bench(case, "ours")
    assert benchmark.extra_info["error"] and benchmark.extra_info["bytes"] > 0


@pytest.mark.parametrize("subject", [CASES[0], modules.BLOCKS[0], modules.ModelCase(18)], ids=lambda case: case.name)
def test_what_is_wrong_fails_by_name_and_has_no_time(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = {"y": {"ok": False, "failed": "R", "rms": 0.3}} if isinstance(subject, ConvCase) else ["dx: R"]
    monkeypatch.setattr(type(subject), "check", lambda *_: wrong)
    monkeypatch.setattr(measured, "interleave", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(pytest.fail.Exception, match=f"{re.escape(subject.name)}, ours: WRONG, not timed: (y|dx): R"):
        bench(subject, "ours")


def test_losses_that_differ_are_wrong() -> None:
    ours, theirs = (modules.Running(lambda: None, 0, losses) for losses in ((7.0, 6.0), (7.0, 6.5)))
    assert modules.losses_apart(theirs, theirs) == []
    assert "apart from eager's" in modules.losses_apart(ours, theirs)[0]


TINY = modules.BlockCase("Bottleneck", 256, 64, 1, 56)
MODULES = [(TINY, candidate) for candidate in ("eager", "graph", "max-autotune", "ours graph, gram")]
MODULES += [(replace(TINY, training=False), candidate) for candidate in ("eager", "ours", "ours graph, single")]
MODULES += [(case, "ours") for case in (*modules.LAYERS[:2], modules.LAYERS[-1])]
MODULES += [(modules.ModelCase(18), "ours graph"), (modules.ModelCase(50, training=False), "ours")]
MODULES += [(modules.ModelCase(18, training=False), "compile")]


@pytest.mark.parametrize(("case", "candidate"), MODULES, ids=lambda value: getattr(value, "name", value))
def test_a_module_s_benchmark(case: Any, candidate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "cost", lambda case, target: modules.Cost(1, 2, 3.0, 4))
    benchmark = bench(case, candidate, "block")
    assert benchmark.extra_info["images_per_s"] > 0 and benchmark.extra_info["peak_bytes"] > 0
    assert benchmark.timed and ("speedup" in benchmark.extra_info) == (candidate != "eager")


def test_peak_memory_s_benchmark() -> None:
    benchmark = Benchmark()
    measured.bench_memory(benchmark, DRY, registry.Entry("memory", modules.ModelCase(18), (), "none"), "ours")
    assert "GiB" in benchmark.group and benchmark.extra_info["peak_bytes"] and benchmark.timed


def test_the_machine_has_the_rates_that_were_measured_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "Device", DryDevice)
    monkeypatch.setattr(measured, "current", lambda device: H100)
    monkeypatch.setattr(measured.facts, "copy_timing", lambda device: (2.5e12, None))
    monkeypatch.setattr(measured.facts, "matmul_timing", lambda device, dtype: (6e14, None))
    found = measured.machine()
    assert found.target == replace(H100, bandwidth=2.5e12, matrix_rate=6e14)
    assert set(found.facts) == set(measured.FACTS) and found.facts["torch"] == torch.__version__


class TestRegistry:
    entries = tuple(registry.entries())

    def test_each_entry_names_tests_that_exist_and_candidates_that_are_known(self) -> None:
        assert {entry.level for entry in self.entries} == set(registry.LEVELS)
        assert len({entry.group for entry in self.entries}) == len(self.entries)
        for entry in self.entries:
            assert (ROOT / "tests" / entry.test).is_file(), entry.test
            known = ("vendor", "ours", "vendor graph") if entry.level == "kernel" else modules.HOW
            assert set(entry.candidates) <= set(known) and "ours" in entry.candidates

    def test_each_kind_of_entry_has_flops_bytes_and_a_floor(self) -> None:
        """One of a kind: the rest would take half a minute."""
        kinds = {(entry.level, entry.operation): entry for entry in self.entries if entry.level in ("kernel", "block")}
        norm = next(entry for entry in self.entries if entry.operation == "BNAddReLU")
        kinds[norm.level, norm.operation] = norm
        kinds["forward", "smallest"] = next(entry for entry in self.entries if entry.level == "forward")
        for entry in kinds.values():
            cost = entry.cost()
            assert cost.bytes > 0 and cost.floor_us > 0 and cost.eager_bytes >= cost.bytes, entry.name

    def test_a_block_costs_what_it_costs_on_paper(self) -> None:
        """138 passes over p-wide tensors eagerly, half as many by the Gram route; the input's gradient is counted."""
        cost, unit = modules.cost(modules.BLOCKS[0]), 2 * 256 * 56 * 56 * 64
        assert cost.eager_bytes / unit == pytest.approx(138, rel=0.01)
        assert 58 < cost.bytes / unit < 72 and cost.plan[0].startswith("gram")

    def test_every_benchmark_of_a_gpu_is_the_registry_s(self) -> None:
        files = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} - {"bench_plan"}
        for name in files:
            assert "registry.runs(registry." in (ROOT / "benchmarks" / f"{name}.py").read_text(), name
        listed = "\n".join((ROOT / "benchmarks" / f"{name}.py").read_text() for name in files)
        for kind in registry.KERNELS:
            assert f'convolutions("{kind}")' in listed
        for launcher in registry.PASSES:
            assert f'"{launcher}"' in listed


class TestVendorGraph:
    case = ConvCase(ConvProblem(2, 5, 5, 8, 16, dtype="float32"), "fprop", "conv3", affine=True, stats=True)
    layers = problems.layers(50, 2, 32, 8, "float32")[:8]
    passes = tuple(
        {case.name: case for layer in layers for case in cases(layer) if not case.gram and case.kind != "pair"}.values()
    )

    def test_without_the_package_it_is_left_out_with_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cudnn", None)
        with pytest.raises(pytest.skip.Exception, match="vendor graph: nvidia-cudnn-frontend is not installed"):
            bench(self.case, "vendor graph")

    @pytest.mark.usefixtures("ieee")
    @pytest.mark.parametrize("case", [case, *passes], ids=lambda case: case.name)
    def test_the_graph_is_the_convolution_with_all_that_ours_fuses(
        self, case: ConvCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        assert bench(case, "vendor graph").timed

    def test_the_cases_hold_all_that_a_graph_may(self) -> None:
        found = {name for case in self.passes for name in ("affine", "coeffs", "residual") if getattr(case, name)}
        found |= {f"{case.kind} stats" for case in self.passes if case.stats}
        assert found == {"affine", "coeffs", "residual", "fprop stats", "dgrad stats"}
        assert any(case.kind == "dgrad" and case.problem.stride == (2, 2) for case in self.passes)
        listed = {e.subject.kind for e in registry.entries() if "vendor graph" in e.candidates}  # type: ignore[union-attr]
        assert listed == {"fprop", "dgrad", "wgrad"}

    @pytest.mark.usefixtures("ieee")
    @pytest.mark.parametrize("wrong", ["relu_backward", "conv_wgrad", "reduction"])
    def test_a_wrong_graph_has_no_time(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCudnn()
        right = getattr(fake, wrong)

        def off(*operands: Any, **more: Any) -> FakeTensor:
            node = right(*operands, **more)
            return fake.node(lambda pack: node.of(pack) * 1.01)

        monkeypatch.setattr(fake, wrong, off)
        monkeypatch.setitem(sys.modules, "cudnn", fake)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        kind = "wgrad" if "wgrad" in wrong else "dgrad"
        case = next(case for case in self.passes if case.kind == kind and case.stats == (kind == "dgrad"))
        with pytest.raises(pytest.fail.Exception, match="vendor graph: WRONG, not timed"):
            bench(case, "vendor graph")

    def test_a_graph_that_the_vendor_refuses_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = FakeCudnn()
        fake.heur_mode = SimpleNamespace()  # asking for a heuristic fails as an unsupported graph does
        fake.cudnnGraphNotSupportedError = AttributeError
        monkeypatch.setitem(sys.modules, "cudnn", fake)
        with pytest.raises(pytest.skip.Exception, match="the vendor's graph API refuses"):
            bench(self.case, "vendor graph")


def test_the_host_s_run_and_the_gpu_s_skip_with_a_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=2", f"--benchmark-json={tmp_path / 'found.json'}"]
    # As a user's shell: neither interpreted nor, to pytest-benchmark's eyes, a worker of somebody's parallel run.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_XDIST"))
    }
    begin = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "a kernel is timed on a GPU, and PyTorch finds none" in run.stdout
    for name in ("bench_plan_conv", "bench_launcher[fprop]", "bench_block[forward and backward]", "bench_explain"):
        assert name in run.stdout
    assert time.monotonic() - begin < 120, "a minute is promised; two are for a machine that does other things, too"
    assert " of kernel (" in run.stdout and "What ran is the host's part" in run.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine_info"]["fused_resnet"]["torch"] == torch.__version__
    assert {"bytes", "flops"} <= set(next(b for b in found["benchmarks"] if "launcher" in b["name"])["extra_info"])


def test_without_pytest_benchmark_one_sentence_says_so() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = run.stderr.strip().splitlines()
    assert line == "ERROR: the benchmarks are pytest-benchmark's, which is not installed here or switched off"


def test_a_regression_fails(tmp_path: Path) -> None:
    """Against a run that seems to have taken a tenth."""
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_plan.py", "--benchmark-only", "-q", "-k", "plan_conv"]
    command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=2", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    saved = tmp_path / "saved.json"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    assert run(f"--benchmark-json={saved}").returncode == 0
    document = json.loads(saved.read_text())
    for one in document["benchmarks"]:
        one["stats"]["median"] /= 10
    saved.write_text(json.dumps(document))
    again = run(f"--benchmark-compare={saved}", "--benchmark-compare-fail=median:100%")
    assert again.returncode != 0 and "Performance has regressed" in again.stdout + again.stderr
