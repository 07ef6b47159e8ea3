"""Two processes of a group: one measures, both plan by its table and keep it."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_resnet as fr
from fused_resnet import compiling
from fused_resnet.plan import planner, store, tables
from fused_resnet.plan.target import Assumption, assume
from fused_resnet.tuning import slots, tune
from tests.conftest import INTERPRETED
from tests.tuning.test_tune import HERE, ONE, Clock, by_width

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU with the interpreter"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo here"),
]


def _measures(rank: int) -> dict[str, Any]:
    slots.FEW = 2
    compiling.compile_all = lambda *_: None  # type: ignore[assignment]
    # Each rank's clock would choose another route.
    compiling.Stopwatch = lambda device: Clock(by_width, {"staged": 1 + rank, "reference": 2 - rank})  # type: ignore
    model = nn.Sequential(fr.ConvBNReLU(64, 64, 1))
    if rank == 1:
        tune.ChainTuner.run = None  # type: ignore[assignment, method-assign]
    with assume(Assumption(HERE)):
        fr.warmup(model, (2, 64, 6, 6), torch.float16, tune=True)
    plan = planner.plan_chain(ONE, HERE)
    return {"route": plan.route, "reason": plan.reason, "disk": sorted(tune.known_of(HERE).routes)}


def _fails(rank: int) -> dict[str, Any]:
    def measure() -> store.Remembered:
        assert rank == 0, "only rank 0 measures"
        raise ValueError("the device is lost")

    try:
        tune.on_every_rank(measure, HERE)
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def _elsewhere(rank: int) -> dict[str, Any]:
    """Rank 1 sits on another GPU."""
    table = store.Remembered(store.identity(HERE), {}, {tables.chain_key(ONE): {"us": {"staged": 1.0}, "source": ""}})
    target = HERE if rank == 0 else fr.Target(**{**vars(HERE), "name": "NVIDIA Other"})
    return {"taken": tune.on_every_rank(lambda: table, target), "route": planner.plan_chain(ONE, target).reason}


def _nothing(rank: int) -> dict[str, Any]:
    return {"taken": tune.on_every_rank(lambda: None, None)}


def _rank(rank: int, folder: str, what: str) -> None:
    os.environ[store.VARIABLE] = f"{folder}/disk{rank}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    result = globals()[what](rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def in_two_ranks(what: str, folder: Path) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(folder), what)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_rank_takes_what_rank_0_measured_and_keeps_it(tmp_path: Path) -> None:
    first, second = in_two_ranks("_measures", tmp_path)
    assert first == second
    assert first["route"] == "staged" and "staged 1 us, reference 2 us" in first["reason"] and len(first["disk"]) == 1
    assert len(list((tmp_path / "disk1").rglob("*.json"))) == 1


def test_where_rank_0_fails_every_rank_hears_of_it(tmp_path: Path) -> None:
    for result in in_two_ranks("_fails", tmp_path):
        assert "could not measure on rank 0: ValueError: the device is lost" in result["error"]


def test_a_rank_on_another_gpu_follows_its_own_table(tmp_path: Path) -> None:
    first, second = in_two_ranks("_elsewhere", tmp_path)
    assert first["taken"] and "measured" in first["route"]
    assert not second["taken"] and "measured" not in second["route"]


def test_ranks_without_a_gpu_do_not_wait_for_each_other(tmp_path: Path) -> None:
    assert in_two_ranks("_nothing", tmp_path) == [{"taken": False}] * 2
