"""In which order a compiled kernel writes a scratch, waits at explicit barriers, and reads the scratch. Needs no GPU.

    python -m tests.barriers

compiles the single-launch bottleneck as it ships, for sm_80 and sm_90, and once without each of its explicit barriers.
It prints the events as JSON: ``w`` a write, ``r`` a read, ``b`` a barrier that the source asks for, ``d`` a descriptor
made of the pointer; the same kind several times in a row is one. Barriers that the compiler adds on its own account are
no events: they stand where they do by accident.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KERNEL = "bottleneck_single_kernel"
BARRIER = "tl.debug_barrier()"
SAME_POINTER = ("tt.splat", "tt.addptr", "tt.broadcast", "tt.expand_dims", "ttg.convert_layout", "arith.select")


def squeezed(events: Iterable[str]) -> str:
    return "".join(kind for kind, _ in itertools.groupby(events))


def in_ttgir(ttgir: str, argument: str) -> str:
    """Follows every pointer that is made of ``argument``."""
    pointers, events = {f"%{argument}"}, []
    for line in ttgir.splitlines():
        body = line.partition(" loc(")[0]
        pointers |= {new for new, old in re.findall(r"(%[\w#]+) = (%[\w#]+)[,)]", body) if old in pointers}
        found = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?([\w.]+) ?(.*)", body)
        if not found:
            continue
        result, operation, rest = found.groups()
        operands = re.findall(r"%[\w#]+", rest)
        touched = any(operand in pointers for operand in operands)
        pointers.discard(result)  # neighbouring regions may use a name again
        if operation in ("gpu.barrier", "ttg.barrier"):
            events.append("b")
        elif operation == "tt.store" and operands[0] in pointers:
            events.append("w")
        elif operation in ("tt.load", "ttg.async_copy_global_to_local") and operands[0] in pointers:
            events.append("r")
        elif "descriptor" in operation and touched:
            events.append("d")
        elif operation in SAME_POINTER and touched and "!tt.ptr" in rest:
            pointers.add(result)
    return squeezed(events)


def in_ptx(ptx: str, source: str, argument: str) -> str:
    """Finds the instructions by the lines of ``source`` that they were made of."""
    lines, events, current = source.splitlines(), [], ""
    for instruction in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", instruction):
            number = int(place[2]) - 1
            current = lines[number].strip() if place[1] == "1" and number < len(lines) else ""
        elif re.search(r"\bbar\.sync\b|\bbarrier\.sync\b", instruction) and current == BARRIER:
            events.append("b")
        elif "st.global" in instruction and current.startswith(f"tl.store({argument}"):
            events.append("w")
        elif re.search(r"ld\.global|cp\.async\.c[ag]", instruction) and f"tl.load({argument}" in current:
            events.append("r")
    return squeezed(events)


def compiled(call: Any, sm: int, source: str) -> Any:
    """The kernel of a captured launch, compiled from ``source``."""
    from fused_resnet.compile_worker import become_compiler
    from tests.compile_audit import mock

    become_compiler(sm)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variant.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"{call.module}_variant", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        arguments = {name: mock(value) for name, value in call.arguments}
        return getattr(module, call.kernel).warmup(**arguments, **dict(call.options), grid=(1,))


def variant(source: str, without: int | None) -> str:
    """``source`` without its N-th barrier; the lines keep their numbers."""
    parts = source.split(BARRIER)
    glue = ["pass" if without == i else BARRIER for i in range(len(parts) - 1)]
    return "".join(part + end for part, end in zip(parts, [*glue, ""], strict=True))


def run(python: str = sys.executable) -> list[dict[str, Any]]:
    """This module's command without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command, folder = [python, "-m", "tests.barriers"], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    from fused_resnet.plan.target import A100, H100
    from tests.shipped import shipped

    calls = [
        (call, target.sm)
        for target in (A100, H100)
        for call in shipped(target, ("bfloat16",), False)
        if call.kernel == KERNEL
    ]
    original = Path(str(importlib.import_module(calls[0][0].module).__file__)).read_text()
    jobs: list[tuple[Any, int, int | None]] = [(call, sm, None) for call, sm in calls]
    jobs += [(*calls[-1], barrier) for barrier in range(original.count(BARRIER))]
    rows = []
    for call, sm, without in jobs:
        source = variant(original, without)
        asm = compiled(call, sm, source).asm
        ttgir = {name: in_ttgir(asm["ttgir"], name) for name in ("scratch_ptr", "affine_ptr")}
        rows.append({"sm": sm, "without": without, "ttgir": ttgir, "ptx": in_ptx(asm["ptx"], source, "scratch_ptr")})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
