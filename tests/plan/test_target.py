"""Targets: presets, what a device's properties mean, why a device is refused, and the interpreter."""

import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch

from fused_resnet.plan import target
from fused_resnet.plan.target import A100, H100, H200, INTERPRETER, Assumption, Target, assume, from_properties, preset

pytestmark = pytest.mark.quick

PROPERTIES = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "shared_memory_per_block_optin": 232_448,
    "L2_cache_size": 50 << 20,
    "memory_clock_rate": 2_619_000,
    "memory_bus_width": 5120,
    "clock_rate": 1_980_000,
}


def described(**changes):
    return from_properties(SimpleNamespace(**{**PROPERTIES, **changes}))


def test_presets_by_name():
    assert (preset("h100"), preset("H200"), preset("a100")) == (H100, H200, A100)
    with pytest.raises(KeyError, match="h100, h200, a100"):
        preset("h101")


def test_a_target_is_frozen_and_hashable():
    assert hash(H100) != hash(H200)
    with pytest.raises(dataclasses.FrozenInstanceError):
        H100.sm = 80  # type: ignore[misc]


def test_a_described_board_takes_its_preset_s_rates():
    found = described()
    assert (found.bandwidth, found.matrix_rate) == (H100.bandwidth, H100.matrix_rate)
    assert (found.sm, found.sm_count, found.shared_memory, found.l2_bytes) == (90, 132, 232_448, 50 << 20)
    assert found.name == "NVIDIA H100 80GB HBM3"


def test_another_board_of_the_same_name_is_estimated_from_its_clocks():
    pcie = described(
        name="NVIDIA H100 PCIe", multi_processor_count=114, memory_clock_rate=1_593_000, clock_rate=1_755_000
    )
    assert pcie.bandwidth == pytest.approx(0.9 * 2.04e12, rel=0.01)
    assert 0.5 * H100.matrix_rate < pcie.matrix_rate < H100.matrix_rate


def test_properties_that_this_pytorch_does_not_have_are_filled_in():
    ada = from_properties(SimpleNamespace(name="NVIDIA L40S", major=8, minor=9, multi_processor_count=142))
    assert ada.shared_memory == 101_376 and ada.bandwidth > 0 and ada.matrix_rate > 0 and ada.l2_bytes > 0


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtypes_of_a_gpu(name):
    assert H100.why_not_dtype(name) is None


def test_refused_dtypes_say_why():
    assert "interpreter only" in H100.why_not_dtype("float64")
    assert "bfloat16" in INTERPRETER.why_not_dtype("bfloat16")
    assert INTERPRETER.why_not_dtype("float64") is None
    assert "int8" in H100.why_not_dtype("int8")


def test_an_assumption_holds_inside_only_and_nests():
    cpu = torch.device("cpu")
    outside = target.current(cpu)
    with assume(Assumption(H100)):
        assert target.current(cpu) is H100 and target.why_not(cpu) is None
        with assume(Assumption(None, "because")):
            assert target.current(cpu) is None and target.why_not(cpu) == "because"
        assert target.current(torch.device("meta")) is H100
    assert target.current(cpu) == outside


def test_an_assumption_does_not_outlive_an_error():
    before = target.current(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), assume(Assumption(H100)):
        _ = 1 / 0
    assert target.current(torch.device("cpu")) == before


def test_meta_tensors_have_no_target():
    assert target.current(torch.device("meta")) is None
    assert "meta" in target.why_not(torch.device("meta"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled in this process")
def test_the_cpu_is_the_interpreter_where_kernels_are_interpreted():
    assert target.interpreted()
    assert target.current(torch.device("cpu")) is INTERPRETER
    assert target.why_not(torch.device("cpu")) is None


@pytest.mark.gpu
def test_the_gpu_of_this_machine():
    found = target.current(torch.device("cuda"))
    assert isinstance(found, Target) and found.sm >= target.MIN_SM and found.bandwidth > 1e11
    assert target.current(torch.device("cuda", torch.cuda.current_device())) is found


def test_an_old_gpu_is_refused_by_its_capability(monkeypatch):
    if target.interpreted():
        monkeypatch.setattr(target, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(target._gpus, 93, described(name="Tesla V100", major=7, minor=0))
    device = torch.device("cuda", 93)
    assert target.current(device) is None
    assert "8.0" in target.why_not(device) and "Tesla V100 has 7.0" in target.why_not(device)


def test_a_gpu_that_is_known_is_not_asked_about_again(monkeypatch):
    def ask(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr(torch.cuda, "is_available", ask)
    monkeypatch.setattr(target, "interpreted", ask)
    monkeypatch.setattr(target, "_gpus", {1: target.H100})
    assert target.current(torch.device("cuda", 1)) is target.H100


def test_tracing_sees_a_target_as_a_constant():
    def scaled(x):
        return x * 2 if target.current(x.device) is None else x * 3

    factor = 2 if target.current(torch.device("cpu")) is None else 3
    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), float(factor)))
