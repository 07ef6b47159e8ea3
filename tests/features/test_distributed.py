"""DistributedDataParallel, FSDP2 and SyncBatchNorm: two processes, gloo, the kernels in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import INTERPRETED
from tests.features.two_ranks import CASES, RANKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each rank reports of all cases: the processes start once."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.features.two_ranks"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    except subprocess.TimeoutExpired:
        errors = ["no end within a quarter of an hour: one rank waits for another"] * RANKS
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank, error in enumerate(errors):
        path = folder / f"rank{rank}.json"
        report = json.loads(path.read_text()) if path.exists() else {"done": [], "failures": {}}
        found.append({**report, "stderr": error[-2000:]})
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, reports: list[dict[str, dict[str, str]]]) -> None:
    for rank, report in enumerate(reports):
        assert case not in report["failures"], f"rank {rank}: {report['failures'][case]}"
        assert case in report["done"], f"rank {rank} ended before: {report['stderr']}"
