"""What the benchmarks share: the GPU or the reason to skip, and in the JSON what the figures were taken with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import measured, registry
from benchmarks.device import Device, versions

NO_GPU = "a kernel is timed on a GPU, and PyTorch finds none"


@pytest.fixture(scope="session")
def gpu() -> measured.Machine:
    """The GPU with its measured ceilings; skips where there is none, since nothing is timed in an interpreter."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return measured.machine()


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks are pytest-benchmark's, which is not installed here or switched off")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """pytest-benchmark's hook: the GPU and the versions, beside the host's."""
    machine_info["fused_resnet"] = Device().facts() if torch.cuda.is_available() else versions()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was left out and why, by level of the registry: counts that pytest's own lines give by file."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not any(NO_GPU in str(report.longrepr) for report in skipped):
        return
    found = {level: [entry for entry in registry.entries() if entry.level == level] for level in registry.LEVELS}
    counts = [f"{len(entries)} of {level} ({len(registry.runs(entries))} runs)" for level, entries in found.items()]
    terminalreporter.write_sep("=", "not timed")
    terminalreporter.write_line(f"{NO_GPU}. The registry has {', '.join(counts)}.")
    terminalreporter.write_line(
        "What ran is the host's part: planning, explain, the Python of a launch and of a block."
    )
