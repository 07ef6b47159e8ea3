"""The compiled kernels, run: the launchers' tests and whole blocks again, on the machine that executes PTX (tests/ptx).

The interpreter takes every kernel as it was written; here it is what the compiler made of it, with its vectors of
loads, its shared memory, its tensor cores and bfloat16, and with the tiles that are planned for a GPU. In processes of
their own, since a kernel is interpreted or compiled for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import INTERPRETED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETED, reason="started once, from the ordinary tests")]

LAUNCHERS = "not planted and not random_edits and not host and not interpreter"
"""Left out: bugs planted in a kernel's source, and configurations of the interpreter's own."""
GEMMS = ("conv_fprop", "conv_dgrad", "conv_wgrad", "conv_pair", "gram", "gram_dgrad", "gram_wgrad", "stem_conv")
PARTS = {
    "sm_90 products": (90, [f"tests/launch/test_{name}.py" for name in GEMMS]),
    "sm_90 boxes": (90, ["tests/launch/test_box_conv.py", "tests/launch/test_box_wgrad.py", "tests/ptx"]),
    "sm_90 passes": (
        90,
        [
            f"tests/launch/test_{name}.py"
            for name in (
                *("bn_act", "bn_act_grad", "bn_stats", "bottleneck_single", "cast", "frozen_grad"),
                *("gram_centred", "gram_projection", "nhwc", "stem_pool"),
            )
        ],
    ),
    "sm_90 groups": (90, ["-m", "quick", "tests/launch/test_bn_sync.py"]),
    "sm_80": (
        80,
        [
            *(f"tests/launch/test_{name}.py" for name in ("conv_fprop", "conv_wgrad", "gram_dgrad", "stem_conv")),
            "tests/ptx/test_chosen.py",
        ],
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_the_compiler_made(part: str) -> None:
    capability, files = PARTS[part]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"FUSED_RESNET_EMULATE": str(capability), "PYTEST_XDIST_WORKER": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LAUNCHERS, *files]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
