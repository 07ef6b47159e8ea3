"""scripts/compare: its options, how it judges, what it prints and draws, and a whole small run."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _compare import job, options, report
from _compare.result import Candidate, Cost, Result

import fused_resnet as fr
from fused_resnet.launch.record import note

ROOT = Path(__file__).resolve().parents[2]
quick = pytest.mark.quick


@quick
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model resnet19", "resnet19"),
        ("--batch-size 0", "positive"),
        ("--batch-size 1", "at least 2"),
        ("--data mnist", "unknown data set"),
        ("--data imagefolder:/nowhere/at/all", "not a directory"),
        ("--data imagefolder", "needs a path"),
        ("--device tpu", "unknown device"),
        ("--device cpu --precision bfloat16", "needs a GPU"),
        ("--image-size 32", "its own size"),
        ("--timed-steps 5", "at least 20"),
        ("--lr nan", "positive"),
        ("--seed -1", "whole number"),
        ("--no-such-thing", "unrecognized"),
    ],
)
def test_bad_options_are_one_sentence(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(arguments.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


@quick
def test_defaults():
    o = options.parse([])
    assert (o.model, o.data, o.batch_size, o.device, o.precision) == ("small", "digits", 64, "auto", "auto")
    assert options.parse(["--model", "cifar_resnet20"]).model == "cifar_resnet20"


@quick
def test_options_need_no_installed_package():
    # -S: without site-packages. The command checks its options before it installs anything.
    command = [sys.executable, "-S", str(ROOT / "scripts/_compare/options.py"), "--help"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0
    for option in (
        "--model",
        "--data",
        "--batch-size",
        "--precision",
        "--steps",
        "--epochs",
        "--device",
        "--out",
        "--seed",
    ):
        assert option in found.stdout


def comparison(eager: list[float], fused: list[float], truth: list[float], **keywords) -> Result:
    candidates = {"eager": Candidate("eager", eager), "fused": Candidate("fused", fused)}
    return Result(batch_size=64, steps=len(truth), truth=truth, candidates=candidates, **keywords)


@quick
def test_judging():
    assert comparison([2.0, 1.0], [2.001, 1.0], [2.0, 1.0]).agrees("fused")
    assert comparison([2.0, 1.0], [2.0, 1.02], [2.0, 1.0]).agrees("fused") is False
    assert comparison([2.0, 1.0], [2.0, math.nan], [2.0, 1.0]).agrees("fused") is False
    # Eager's own rounding error widens what is allowed, up to where a comparison says nothing more.
    assert comparison([2.01, 1.0], [2.04, 1.0], [2.0, 1.0]).agrees("fused")
    drifted = comparison([2.0, 1.5, 0.2], [2.0, 0.8, 0.9], [2.0, 1.0, 0.5])
    assert drifted.compared() == 1 and drifted.agrees("fused")
    exact = comparison([2.0], [2.0], [2.0])
    exact.candidates["fused float64"] = Candidate("fused float64", [2.0 + 1e-6], exact=True)
    assert exact.agrees("fused float64") is False
    assert Result().agrees("fused") is None


@quick
def test_table_and_picture_of_a_measured_run(tmp_path):
    pytest.importorskip("matplotlib")
    from _compare.picture import draw

    r = comparison([2.0, 1.0], [2.0, 1.0], [2.0, 1.0], measured=True, floor="bfloat16")
    r.candidates["compiled"] = Candidate("compiled", [2.0, 1.0], note="left out")
    r.candidates["eager"].times_ms = [10.0] * 20
    r.candidates["fused"].times_ms = [5.0] * 19 + [50.0]
    r.candidates["fused"].peak_bytes = 3 << 30
    r.projection = [Cost("resnet50", route, 1e12, 1e9, 1e9, 100, 1e4) for route in ("eager", "fused")]
    text = report.table(r)
    assert "2.00x" in text and "12,800" in text and "3,072 MiB" in text and "No speed" not in text
    draw(r, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    r.failures.append("the losses of fused disagree")
    r.measured = False
    text = report.table(r)
    assert "FAILED" in text and "2.00x" not in text


@quick
def test_nothing_found_yet_can_be_shown(tmp_path):
    pytest.importorskip("matplotlib")
    from _compare.picture import draw

    r = Result(interrupted=True, facts={"model": "small"})
    assert "Ctrl-C" in report.table(r)
    draw(r, tmp_path / "picture.png")


class _Noted(fr.reference.ResNet):
    """Stands in for the fused network: plain PyTorch that says it launched a kernel; ``wrong`` spoils a gradient."""

    wrong = 1.0

    def forward(self, x):
        note("bn_act_kernel", 0, [x], {})
        if self.wrong != 1.0 and self.training and not self.fc.weight._backward_hooks:
            self.fc.weight.register_hook(lambda gradient: gradient * self.wrong)
        return super().forward(x)


class _Wrong(_Noted):
    wrong = 1.2


def made_up_costs(*_, **__) -> SimpleNamespace:
    """In place of ``explain``, which has tests of its own."""
    counted = {"flops": 2.0, "bytes": 2.0, "saved_bytes": 2.0, "launches": 2, "floor_us": 2.0}
    return SimpleNamespace(**counted, eager=SimpleNamespace(**counted))


def stand_in(network: type) -> SimpleNamespace:
    """What the job uses of fused_resnet, with ``network`` for the fused one."""
    return SimpleNamespace(
        reference=fr.reference,
        ResNet=network,
        Bottleneck=fr.reference.Bottleneck,
        resnet50=fr.reference.Family(network=network).resnet50,
        record_launches=fr.record_launches,
    )


@pytest.mark.parametrize(("network", "fails"), [(_Noted, 0), (_Wrong, 2), (fr.reference.ResNet, 1)])
def test_job_with_a_stand_in(network, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "fr", stand_in(network))
    monkeypatch.setattr(job, "explain", made_up_costs)
    o = options.parse(shlex.split("--epochs 1 --steps 3 --batch-size 16 --limit 80 --lr 0.2"))
    result, said = Result(), []
    job.Job(o, torch.device("cpu"), result, said.append).run()
    assert len(result.failures) == fails, result.failures
    assert len(result.candidates["eager"].losses) == 5 and len(result.candidates["fused"].losses) == 3
    assert len(result.projection) == 4
    json.dumps(result.to_dict())


def test_a_job_stops_where_an_interrupt_was_dropped(tmp_path, monkeypatch):
    """Python drops a KeyboardInterrupt that a finaliser raises; the next step sees that somebody asked."""
    monkeypatch.setattr(job, "fr", stand_in(_Noted))
    monkeypatch.setattr(job, "explain", made_up_costs)
    o = options.parse(shlex.split("--epochs 1 --steps 3 --batch-size 16 --limit 80 --lr 0.2"))
    result, asked = Result(), itertools.count()
    with pytest.raises(KeyboardInterrupt):
        job.Job(o, torch.device("cpu"), result, str, stopped=lambda: next(asked) >= 6).run()
    assert 0 < len(result.candidates["eager"].losses) < 5 and "fused" not in result.candidates


class _Event:
    """A CUDA event that keeps the time of the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1000


@pytest.mark.parametrize("compiler", ["works", "fails"])
def test_job_as_on_a_gpu(compiler, tmp_path, monkeypatch):
    """The order and the bookkeeping of a measurement, with the host's clock in place of a GPU's."""

    def compile_model(model, mode):
        if compiler == "fails":
            raise RuntimeError("no C compiler\nand more")
        return model

    monkeypatch.setattr(job, "fr", stand_in(_Noted))
    monkeypatch.setattr(job, "explain", made_up_costs)
    monkeypatch.setattr(torch, "compile", compile_model)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for name, count in (("memory_allocated", 1 << 20), ("max_memory_allocated", 5 << 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count)
    monkeypatch.setattr(job.Job, "gpu", property(lambda self: True, lambda self, value: None), raising=False)
    o = options.parse(shlex.split("--epochs 1 --steps 3 --batch-size 8 --limit 24 --timed-steps 22"))
    result, said = Result(), []
    job.Job(o, torch.device("cpu"), result, said.append).run()
    assert not result.failures and result.measured and result.floor == "bfloat16"
    timed = [c.name for c in result.candidates.values() if len(c.times_ms) == 25]
    assert timed == (["eager", "compiled", "fused"] if compiler == "works" else ["eager", "fused"])
    assert all(result.candidates[name].peak_bytes == 4 << 20 and result.candidates[name].accuracy for name in timed)
    text = report.table(result)
    assert "4 MiB" in text and "times eager's speed" in text
    assert ("no C compiler" in text) == (compiler == "fails")


def program(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/compare_main.py"), "--device", "cpu", "--out", str(out), *arguments]


@pytest.mark.slow
def test_whole_run_through_the_kernels(tmp_path):
    pytest.importorskip("matplotlib")
    small = ["--epochs", "1", "--steps", "2", "--batch-size", "16", "--limit", "32"]
    found = subprocess.run(program(tmp_path, *small), capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "The losses agree" in found.stdout and "No speed was measured" in found.stdout
    assert {"compare.png", "compare.txt", "compare.json"} <= {file.name for file in tmp_path.iterdir()}
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["candidates"]["fused"]["kernels"] > 50 and record["errors"]["fused float64"] < 1e-9


@pytest.mark.slow
def test_ctrl_c_leaves_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    process = subprocess.Popen(
        program(tmp_path, "--epochs", "500"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch   1" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors and "Stopped by Ctrl-C" in out and "eager" in out
    assert (tmp_path / "compare.png").is_file()


@quick
def test_bad_device_is_one_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [*program(tmp_path), "--device", "cuda"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "no CUDA GPU" in found.stderr
