"""Compiles every kernel configuration that ships, for sm_80 and sm_90, and reads what came out. Needs no GPU.

    python -m tests.compile_audit [--sm 80 90] [--dtypes bfloat16 float16 float32] [--kernel NAME] [--covering]

``--sm`` takes 86, 89, 100 and 120 too: GPUs that nothing was tuned for, whose users get the planner's guesses. It
prints a table (registers, shared memory, programs per SM, tensor instructions) and exits with 1 if any of them spills,
asks for more shared memory than a block may have, uses no wgmma where it should, or addresses rows with 32 bits.
``--dependent``: one configuration of each kernel as a dependent launch (sm_90), which must wait before all else.
``--largest``: the largest tile of each kernel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.occupancy import PROCESSORS, RESERVED, occupancy, resources

TUNED = (80, 90)
"""Compute capabilities whose configurations were pruned of what spills. Elsewhere a spill is slow, and no failure."""
BOARDS = {86: ("A10", 72), 89: ("L40S", 142), 100: ("B200", 148), 120: ("RTX 5090", 170)}
"""Of the others: a board, and its multiprocessors."""
SMALL_ONLY = ("bn_merge", "bn_finalize", "bn_frozen", "bn_grad_merge", "bn_grad_finalize", "bn_sync", "gram_reduce")
"""Kernels that address statistics and their tiles, a hundredth of an activation: 32 bits do."""
DESCRIBED = ("box_", "walk_")
"""Kernels that read by tensor descriptors: for sm_90 alone."""
PARKED = 16
"""Bytes a thread: ptxas now and then parks an address or two across the main loop, which costs nothing."""
MEASURED = 512
"""Bytes a thread that a tile may spill if it was measured to be the fastest all the same."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    kernel: str
    where: str
    constants: str
    sm: int
    warps: int
    registers: int
    spilled: int
    shared: int
    wgmma: bool
    failures: tuple[str, ...]

    @property
    def programs_per_sm(self) -> int:
        return occupancy(self.registers, self.shared, self.warps, self.sm).programs

    def row(self) -> str:
        verdict = "; ".join(self.failures) or "ok"
        return (
            f"sm_{self.sm} {self.kernel:<28} {self.warps:>2}w {self.registers:>4} {self.spilled:>5} "
            f"{self.shared:>7} {self.programs_per_sm:>3} {'wgmma' if self.wgmma else '':<5} {verdict:<4} "
            f"{self.constants}  ({self.where})"
        )


HEADER = (
    f"{'':5} {'kernel':<28} {'':>3} {'regs':>4} {'spill':>5} {'shared':>7} {'/SM':>3} {'':<5} constants (first use)"
)


def mock(value: Any) -> Any:
    """An argument as the compiler takes it where there is no tensor: a dtype stands for one, in tuples too."""
    import torch
    from triton.runtime.jit import MockTensor

    from tests.capture import Descriptor

    if isinstance(value, Descriptor):
        return value.made()
    if isinstance(value, tuple):
        return type(value)(*map(mock, value))
    return MockTensor(value) if isinstance(value, torch.dtype) else value


def compile_call(call: Any, sm: int, dependent: bool = False) -> Compiled:
    """Compiles one captured launch through Triton's own path, so that it specialises as at run time."""
    from fused_resnet.compile_worker import become_compiler

    become_compiler(sm)
    kernel = getattr(importlib.import_module(call.module), call.kernel)
    arguments = {n: mock(v) for n, v in call.arguments}
    options = dict(call.options)
    if dependent:
        arguments["DEPENDENT"], options["launch_pdl"] = True, True
    constants = {n: v for n, v in call.arguments if n in call.constants}
    shown = " ".join(f"{n}={v}" for n, v in constants.items() if v is not False and n not in ("ACC", "PRECISION"))
    shown = f"{str(call.dtype).removeprefix('torch.')} {shown}"
    warps = options["num_warps"]
    try:
        compiled = kernel.warmup(**arguments, **options, grid=(1,))
    except Exception as error:  # the compiler's refusal is the finding
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip(" ^")), "")
        message = f"does not compile: {type(error).__name__}: {reason[:300]}"
        return Compiled(call.kernel, call.where, shown, sm, warps, 0, 0, 0, False, (message,))

    registers, local = resources(compiled.asm["cubin"])
    shared, wgmma = compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"]
    failures = []
    if local > (MEASURED if call.measured or sm not in TUNED else PARKED):
        failures.append(f"spills {local} bytes a thread")
    most = PROCESSORS[sm].shared - RESERVED
    if shared > most:
        failures.append(f"{shared} bytes of shared memory, a block has {most}")
    if sm == 90 and wants_wgmma(call) and not wgmma:
        failures.append("no wgmma")
    if not call.kernel.startswith(SMALL_ONLY) and not wide_rows(compiled.asm["ttir"]):
        failures.append("no 64-bit row offsets")
    if dependent and not waits_first(compiled.asm["ptx"]):
        failures.append("touches memory before it waits")
    return Compiled(call.kernel, call.where, shown, sm, warps, registers, local, shared, wgmma, tuple(failures))


def wants_wgmma(call: Any) -> bool:
    """A 16-bit GEMM whose tile has the 64 rows of a warp group, in whichever order it multiplies."""
    import torch

    if not call.is_gemm or call.dtype not in (torch.bfloat16, torch.float16):
        return False
    tile = [call.value(name) for name in ("BLOCK_M", "BLOCK_N") if call.value(name) is not None]
    return bool(tile) and min(tile) >= 64 and dict(call.options)["num_warps"] >= 4


def wide_rows(ttir: str) -> bool:
    """Whether the kernel, if it addresses two-dimensional tiles at all, has 64-bit offsets somewhere."""
    tiles = re.findall(r"tt\.addptr .*tensor<\d+x\d+[^!]*!tt\.ptr", ttir)
    return not tiles or bool(re.search(r"arith\.(muli|addi|extsi) .*i64", ttir))


def waits_first(ptx: str) -> bool:
    """Whether a dependent launch lets the next one start and waits for the one before, then touches global memory."""
    order = re.findall(r"griddepcontrol\.\w+|\b(?:ld|st|atom|red)\.\S*global|\bcp\.async|\bprefetch|\bld\.const", ptx)
    return order[:2] == ["griddepcontrol.launch_dependents", "griddepcontrol.wait"]


def _compile(job: tuple[Any, int, bool]) -> Compiled:
    return compile_call(*job)


def target_of(sm: int) -> Any:
    """What the planner knows of such a GPU: a preset, or what it makes of a board's properties."""
    from fused_resnet.plan.target import A100, H100, from_properties

    if sm in TUNED:
        return {80: A100, 90: H100}[sm]
    name, processors = BOARDS[sm]
    major, minor = divmod(sm, 10)
    shared = PROCESSORS[sm].shared - RESERVED
    properties = {"name": name, "major": major, "minor": minor, "multi_processor_count": processors}
    return from_properties(SimpleNamespace(**properties, shared_memory_per_block_optin=shared))


def tile_elements(call: Any) -> int:
    """How much a program works on at a time, by all that its constants say of it."""
    blocks = [value for name, value in call.arguments if name.startswith("BLOCK_") and isinstance(value, int)]
    return math.prod(blocks) * dict(call.options).get("num_stages", 1)


def audit(
    sms: Iterable[int],
    dtypes: tuple[str, ...],
    *,
    exact: bool,
    kernel: str = "",
    jobs: int = 2,
    dependent: bool = False,
    largest: bool = False,
) -> Iterator[Compiled]:
    """Compiles what ships for each of ``sms``, ``jobs`` at a time; ``dependent``, ``largest``: one of each kernel."""
    from tests.shipped import shipped

    work = [
        (call, sm, dependent) for sm in sms for call in shipped(target_of(sm), dtypes, exact) if kernel in call.kernel
    ]
    if dependent or largest:
        work.sort(key=lambda job: tile_elements(job[0]))
        work = list({(call.kernel, sm): (call, sm, *rest) for call, sm, *rest in work}.values())
    work.sort(key=lambda job: (job[0].kernel, job[1], job[0].key()))
    context = multiprocessing.get_context("spawn")  # LLVM does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_compile, work, chunksize=4)


def in_subprocess(arguments: list[str], python: str = sys.executable) -> list[Compiled]:
    """Runs this module's command without the interpreter, in ``python``, and returns what it found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.json"
        command = [python, "-m", "tests.compile_audit", *arguments, "--json", str(path)]
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
        )
        if not path.exists():
            raise RuntimeError(done.stdout + done.stderr)
        rows = json.loads(path.read_text())
    return [Compiled(**{**row, "failures": tuple(row["failures"])}) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sm", type=int, nargs="+", choices=sorted(PROCESSORS), default=list(TUNED), help="compute capabilities"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], help="of the activations")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--covering", action="store_true", help="one of each set of constants, whatever the sizes")
    parser.add_argument("--dependent", action="store_true", help="one of each kernel, as a dependent launch (sm_90)")
    parser.add_argument("--largest", action="store_true", help="the largest tile of each kernel")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") == "1" and "triton" in sys.modules:
        parser.error("TRITON_INTERPRET=1 makes interpreted kernels: unset it")
    print(HEADER)
    found = []
    exact = not arguments.covering
    how = {name: getattr(arguments, name) for name in ("kernel", "jobs", "dependent", "largest")}
    for compiled in audit([90] if arguments.dependent else arguments.sm, tuple(arguments.dtypes), exact=exact, **how):
        found.append(compiled)
        print(compiled.row(), flush=True)
    bad = [compiled for compiled in found if compiled.failures]
    print(f"{len(found)} compilations, {len(bad)} refused")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(compiled) for compiled in found]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
