"""What ships compiles for sm_80 and sm_90, fits, does not spill, and uses the tensor cores. Needs no GPU.

``python -m tests.compile_audit`` compiles everything; here one of each set of constants, whatever the layer's size.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.compile_audit import DESCRIBED, HEADER, Compiled, in_subprocess, target_of, wide_rows

FOLDER = Path(__file__).parent.parent / "fused_resnet" / "kernels"
KERNELS = {name for file in FOLDER.glob("*.py") for name in re.findall(r"def (\w+_kernel)\(", file.read_text())}
OTHER_PYTHON = os.environ.get("FUSED_RESNET_OTHER_PYTHON")


def refused(found: list[Compiled]) -> str:
    return "\n".join([HEADER, *(c.row() for c in found if c.failures)])


def kernels_of(sm: int) -> set[str]:
    return {name for name in KERNELS if target_of(sm).has_group_products or not name.startswith(DESCRIBED)}


@pytest.mark.parametrize("sm", [80, 90])
def test_every_kernel_in_bfloat16(sm):
    found = in_subprocess(["--covering", "--sm", str(sm), "--dtypes", "bfloat16"])
    assert {c.kernel for c in found} == kernels_of(sm), "tests/shipped.py must launch every kernel"
    assert not any(c.failures for c in found), refused(found)
    assert any(c.wgmma for c in found) == (sm == 90)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [86, 100, 120])
def test_the_largest_tiles_on_gpus_that_nothing_was_tuned_for(sm):
    found = in_subprocess(["--covering", "--largest", "--sm", str(sm), "--dtypes", "bfloat16"])
    missing = kernels_of(sm) - {c.kernel for c in found}
    assert missing <= {"stem_conv_wgrad_kernel"}, "what does not fit into shared memory is the vendor's"
    assert not any(c.failures for c in found), refused(found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sm", [80, 90])
def test_convolutions_in_other_dtypes(sm, dtype):
    found = in_subprocess(["--covering", "--sm", str(sm), "--dtypes", dtype, "--kernel", "conv_"])
    assert not any(c.failures for c in found), refused(found)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER_PYTHON, reason="FUSED_RESNET_OTHER_PYTHON names no Python with another Triton")
def test_under_the_other_triton():
    found = in_subprocess(["--covering", "--dtypes", "bfloat16"], python=OTHER_PYTHON)
    assert {c.kernel for c in found} == KERNELS, "tests/shipped.py must launch every kernel"
    assert not any(c.failures for c in found), refused(found)


@pytest.mark.quick
def test_programs_per_sm():
    def of(registers: int, shared: int, warps: int, sm: int = 90) -> int:
        return Compiled("k", "", "", sm, warps, registers, 0, shared, False, ()).programs_per_sm

    assert of(128, 0, 8) == 2, "64 Ki registers"
    assert of(129, 0, 8) == 1
    assert of(32, 99_328, 4) == 2, "228 KiB of shared memory"
    assert of(16, 0, 32) == 2, "2048 threads"
    assert of(16, 0, 1) == 32, "32 programs"


@pytest.mark.quick
def test_row_offsets_of_32_bits_are_found():
    narrow = "%1 = tt.addptr %0, %o : tensor<128x64x!tt.ptr<bf16>>, tensor<128x64xi32>"
    assert not wide_rows(f"%o = arith.muli %r, %c : tensor<128x1xi32>\n{narrow}")
    assert wide_rows(f"%r = arith.extsi %m : tensor<128x1xi32> to tensor<128x1xi64>\n{narrow}")
    assert wide_rows("%1 = tt.addptr %0, %o : tensor<128x!tt.ptr<f32>>, tensor<128xi32>")
