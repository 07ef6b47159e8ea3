"""SyncBatchNorm on a GPU, two processes on it: our blocks beside PyTorch's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.features.sync_case import RANKS

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")
def test_blocks_beside_pytorchs_own(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.features.sync_on_gpu"]
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], **options) for rank in range(RANKS)]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, error in enumerate(errors):
        report = tmp_path / f"rank{rank}.json"
        assert report.exists(), error[-2000:]
        assert json.loads(report.read_text()) == [], f"rank {rank}"
