"""What is read from machine code: by hand-written listings, by kernels planted with a flaw, and of a whole network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet as fr
from benchmarks import compiled, machine_code, occupancy
from benchmarks.sass import Instruction, parsed
from fused_resnet.plan.target import A100, H100

ROOT = Path(__file__).parent.parent.parent
LISTING = """
        /*0000*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   IADD3 R9, R9, 0x1, RZ ;
.L_x_1:
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/              @!P1 LDGSTS.E.BYPASS.128 [R6], desc[UR4][R2.64], P2 ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   LDGSTS.E.64 [R6+0x800], desc[UR4][R2.64] ;
        /*0070*/                   LDGDEPBAR ;
        /*0080*/                   IMAD.U32 R10, R8, 0x10000, RZ ;
        /*0090*/                   IMAD.U32 R10, R8, R9, RZ ;
        /*00a0*/                   FFMA R11, R10, R10, R11 ;
        /*00b0*/                   F2F.BF16.F32 R12, R11 ;
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00d0*/              @P0 BRA `(.L_x_1) ;
        /*00e0*/              @P3 BRA `(.L_x_0) ;
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
        /*0120*/                   NOP;
"""

PLANTED = """
import triton
import triton.language as tl

@triton.jit
def wide_kernel(x_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for row in range(rows):
        tl.store(out_ptr + row * BLOCK + offs, tl.load(x_ptr + row * BLOCK + offs) + 1.0)

@triton.jit
def narrow_kernel(x_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for row in range(rows):
        tl.store(out_ptr + row * BLOCK + offs, tl.load(x_ptr + row * BLOCK + offs * 3) + 1.0)

@triton.jit
def spilling_kernel(x_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(x_ptr + offs)
    total = kept * 0.0
    for row in range(rows):
        total = total * kept + tl.load(x_ptr + row * BLOCK + offs)
    tl.store(out_ptr + offs, total + kept)
"""
READ = """
import dataclasses, json, torch
from benchmarks.machine_code import Alike, Shape, read, row_of
from fused_resnet.compile_worker import Job, TensorArgument, become_compiler
from fused_resnet.launch.record import Launch
from fused_resnet.plan.target import A100, H100

rows = []
for target in (H100, A100):
    become_compiler(target.sm)
    for name in ("wide", "narrow", "spilling"):
        tensor = TensorArgument(torch.float32, True)
        arguments = {"x_ptr": tensor, "out_ptr": tensor, "rows": 64, "BLOCK": 4096}
        options = {"num_warps": 1, "maxnreg": 64} if name == "spilling" else {"num_warps": 8}
        job = Job("planted", f"{name}_kernel", arguments, options)
        row = row_of(Alike(Shape(name, "", "", ""), job, (264,), Launch(name, 0, 1 << 20, {}), 1), read(job), target)
        rows.append({"sm": target.sm} | dataclasses.asdict(row))
print(json.dumps(rows))
"""

needs_disassembler = pytest.mark.skipif(
    not (occupancy.TOOLS / "nvdisasm").exists(),
    reason="this Triton came without nvdisasm, which reads compiled kernels",
)


def run(arguments: list[str], **environment: str) -> str:
    """A Python without the interpreter."""
    variables = {**os.environ, **environment}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.quick
def test_a_listing() -> None:
    code = parsed(LISTING, warps=4)
    assert code.loop is not None and len(code.whole.instructions) == 18, "no padding"
    assert [i.stem for i in code.loop.instructions][::11] == ["DEPBAR", "BRA"], "the innermost loop"
    expected = {"wait": 4, "global": 2, "convert": 2, "integer": 1, "float": 1, "tensor": 1, "control": 1}
    assert code.loop.mix == expected and code.loop.slow == 1
    assert code.loop.issue_cycles == 12 and code.loop.flop == 2 * 64 * 128 * 16
    assert code.loop.narrow == {"load 8": 1} and code.outside.narrow == {"load 2": 1}
    assert len(code.outside.instructions) == 6 and code.outside.moved("STG") == 16 * 128
    assert code.loop.in_flight == (16 + 8) * 128 * 2, "two groups pending beside two that begin"


@pytest.mark.quick
def test_what_instructions_are_for() -> None:
    kinds = {
        "LOP3.LUT R1, R2, 0xffff0000, RZ, 0xc0, !PT": "convert",
        "LOP3.LUT R1, R2, 0xff, RZ, 0xc0, !PT": "integer",
        "HADD2.F32 R4, -RZ, R4.H0_H0": "convert",
        "HADD2 R4, R5, R4": "float",
        "FSETP.GTU.AND P0, PT, R1, RZ, PT": "float",
        "FLO.U32 R1, R2": "integer",
        "LDL.LU R4, [R1+0x4]": "local",
        "FENCE.VIEW.ASYNC.S": "wait",
        "UTMALDG.4D [UR8], [UR4], desc[URZ]": "global",
        "HMMA.16816.F32.BF16 R4, R8, R10, R4": "tensor",
    }
    found = {text: Instruction(*text.partition(" ")[::2]).kind for text in kinds}
    assert found == kinds
    assert Instruction("HMMA.16816.F32.BF16", "").flop == 2 * 16 * 8 * 16
    assert Instruction("HMMA.1688.F32.TF32", "").flop == 2 * 16 * 8 * 8
    widths = {"LDG.E": 4, "LDG.E.U8": 1, "STG.E.U16": 2, "LDGSTS.E.64": 8, "LDGSTS.E.BYPASS.LTC128B.128": 16}
    assert {name: Instruction(name, "").width for name in widths} == widths


@pytest.mark.quick
def test_waves() -> None:
    assert occupancy.waves(132 * 4, 2, 132) == (2.0, 1.0)
    count, last = occupancy.waves(132 * 3, 2, 132)
    assert (count, last) == (1.5, 0.5)
    assert occupancy.occupancy(128, 0, 8, 90) == (2, "registers")
    assert occupancy.occupancy(32, 99_328, 4, 90) == (2, "shared memory")


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", [H100, A100], ids=lambda target: target.name)
def test_launches_are_those_of_explain(target: Any, training: bool) -> None:
    with torch.device("meta"):
        model = fr.resnet50().to(memory_format=torch.channels_last).train(training)
    shape = (256, 3, 224, 224)
    step, jobs = machine_code.step_of(model, shape, torch.bfloat16, target, training)
    rows = [row for row in fr.explain(model, shape, target=target, training=training).rows if row.source != "eager"]
    ours = [(alike.entry, alike.times) for alike in step.kernels.values()]
    assert sum(count for _, count in ours) + len(step.others) == sum(row.launches for row in rows)
    for what in ("flops", "bytes"):
        total = sum(getattr(e, what) * n for e, n in ours) + sum(getattr(e, what) for e in step.others)
        assert total == sum(getattr(row, what) for row in rows)
    assert {id(alike.job) for alike in step.kernels.values()} == {id(job) for job in jobs}


@needs_disassembler
def test_a_spill_and_narrow_loads_are_named(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(textwrap.dedent(PLANTED))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for row in json.loads(run(["-c", READ], PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path / "cache"))):
        flaws = {"spilling": row["spilled"] > 0, "narrow": bool(row["narrow"])}
        assert flaws == {name: name == row["kernel"] for name in flaws}, row
        if row["kernel"] == "narrow":
            assert row["narrow"] == {"load 4": 16}
        assert row["loop"]["global"] > 0 and row["issue"] > 0 and row["tensor"] == 0
        assert row["waves"] == pytest.approx(264 / row["programs"] / (132 if row["sm"] == 90 else 108))


@needs_disassembler
def test_a_network_s_table(tmp_path: Path) -> None:
    """The command: a table, the same as JSON, and nothing has changed since."""
    words = ["-m", "benchmarks.compiled", "--model", "small", "--batch", "8", "--size", "32", "--workers", "1"]
    words += ["--inference", "--json", str(tmp_path / "rows.json")]
    table = run(words)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert (
        found["sm"] == 90
        and found["versions"]["triton"]
        and found["launches"] == sum(r["count"] for r in found["rows"])
    )
    assert table.count("\n| `") == len(found["rows"]) > 5
    beyond = [row["projected_us"] - row["floor_us"] for row in found["rows"]]
    assert beyond == sorted(beyond, reverse=True), "the worst first"
    products = [row for row in found["rows"] if row["kernel"] == "conv_fprop_kernel"]
    assert products and all(row["loop"]["tensor"] and row["tensor"] > 0 for row in products)
    assert run([*words, "--before", str(tmp_path / "rows.json")]).strip() == "nothing changed"


@pytest.mark.quick
def test_what_changed_is_told() -> None:
    row = machine_code.Row(
        "a", "M=1", "", "64", 1, 2.0, 1.0, 64, 0, 0, 4, "registers", 9, 1.0, 1.0, {}, 0, 0, 8.0, 4.0, 1.0, {}, {}
    )
    worse = machine_code.Row(**{**vars(row), "registers": 255, "spilled": 12, "narrow": {"load 2": 4}})
    assert compiled.changed([row], [row]) == "nothing changed"
    assert (
        compiled.changed([row], [worse]) == "a M=1  64: registers 64 -> 255, spilled 0 -> 12, narrow none -> 4 × load 2"
    )
    assert compiled.changed([row], []) == "a M=1  64: gone"


@pytest.mark.quick
def test_the_page_has_both_targets_tables() -> None:
    page = compiled.PAGE.read_text()
    for name, sm in (("h100", 90), ("a100", 80)):
        assert f"compiled for sm_{sm} and counted for {name}" in page
        assert compiled.updated(page, name, "new") != page
    with pytest.raises(ValueError, match="no place for a table of h200"):
        compiled.updated(page, "h200", "")
