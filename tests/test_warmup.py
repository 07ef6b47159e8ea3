"""warmup: what a step would launch is compiled, in other processes, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet import compiling, jobs
from fused_resnet.compile_worker import Job, TensorArgument
from fused_resnet.explain import assumption_of, image_like
from fused_resnet.plan.target import assume
from fused_resnet.rehearsal import rehearse

SHAPE = (8, 64, 14, 14)


def block() -> fr.Bottleneck:
    return fr.Bottleneck(64, 16).to(memory_format=torch.channels_last)


def compiled_kernels(cache: Path) -> list[str]:
    """Names of the kernels in a cache of Triton's, one per piece of code."""
    return sorted(json.loads(path.read_text())["name"] for path in cache.glob("*/*.json") if "__grp__" not in path.name)


def test_compiles_once_what_a_step_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = block()
    before = {name: (t.clone(), t._version) for name, t in model.state_dict().items()}
    count = fr.warmup(model, SHAPE, target="h100", workers=2)
    found = compiled_kernels(tmp_path)
    assert len(found) == count > 5
    launched = {entry.kernel for entry in launches(model)}
    assert set(found) == {name for name in launched if name.endswith("_kernel")}
    assert fr.warmup(model, SHAPE, target="h100", workers=2) == count
    assert compiled_kernels(tmp_path) == found, "the second time everything is there"
    for name, t in model.state_dict().items():
        assert t._version == before[name][1] and torch.equal(t, before[name][0])


def launches(model: torch.nn.Module) -> list[fr.Launch]:
    with assume(assumption_of(model, "h100")):
        shares = rehearse(model, [image_like(SHAPE, torch.bfloat16)], torch.bfloat16, True)
    return [entry for share in shares.values() for entry in share.launches]


def jobs_of(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> list[Job]:
    kept: list[Job] = []
    monkeypatch.setattr(compiling, "compile_all", lambda jobs, capability, workers: kept.extend(jobs))
    assert fr.warmup(*arguments, **options) == len(kept)
    return kept


@pytest.mark.quick
def test_alike_launches_are_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    one = jobs_of(monkeypatch, block(), SHAPE, target="h100")
    two = jobs_of(monkeypatch, torch.nn.Sequential(block(), block()), SHAPE, target="h100")
    three = jobs_of(monkeypatch, torch.nn.Sequential(block(), block(), block()), SHAPE, target="h100")
    assert len(one) < len(two) == len(three), "a second block has an input that wants a gradient, a third is like it"
    inference = jobs_of(monkeypatch, block().eval(), SHAPE, target="h100", training=False)
    assert 0 < len(inference) < len(one)
    assert not {job.kernel for job in inference} & {"conv_dgrad_kernel", "gram_wgrad_kernel", "conv_wgrad_kernel"}


@pytest.mark.quick
def test_without_a_gpu_or_on_the_reference_route_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_all", lambda *_: pytest.fail("something was compiled"))
    assert fr.warmup(block(), SHAPE) == 0
    with fr.use_route("reference"):
        assert fr.warmup(block(), SHAPE, target="h100") == 0
    with pytest.raises(KeyError):
        fr.warmup(block(), SHAPE, target="no such gpu")


def test_a_block_in_one_launch_is_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are tuples of tensors."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = torch.nn.Sequential(block(), block()).eval()
    with fr.use_route("single"):
        count = fr.warmup(model, SHAPE, training=False, target="h100", workers=1)
    found = compiled_kernels(tmp_path)
    assert len(found) == count and found.count("bottleneck_single_kernel") == 1


def test_what_does_not_compile_is_named() -> None:
    arguments = {"x_ptr": TensorArgument(torch.float32, True)}
    with pytest.raises(RuntimeError, match="1 kernels do not compile for sm_90: bn_act_kernel: "):
        compiling.compile_all([Job("fused_resnet.kernels.bn_act", "bn_act_kernel", arguments, {})], 90)


@pytest.mark.quick
def test_a_described_tensor_keeps_what_decides_the_code() -> None:
    for t in (torch.empty(8), torch.empty(8, dtype=torch.bfloat16)[1:], torch.empty(8, device="meta")[4:]):
        built = jobs.described(t).build()
        assert (built.dtype, built.data_ptr() % 16 == 0) == (t.dtype, t.data_ptr() % 16 == 0)
