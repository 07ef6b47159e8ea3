"""How the commands in scripts/ start: what a Python lacks for them is one sentence. Needs no other module itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

OURS = {"benchmarks", "fused_resnet"}


def run(name: str, module: str) -> NoReturn:
    """Ends with what the ``main`` of ``module`` returns, as ``scripts/<name>``; stopped by Ctrl-C with 130."""
    try:
        sys.exit(_main(name, module)())
    except KeyboardInterrupt:
        print(f"\nscripts/{name}: stopped", file=sys.stderr)
        sys.exit(130)


def _main(name: str, module: str) -> Callable[[], int]:
    try:
        return importlib.import_module(module).main  # type: ignore[no-any-return]
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] in OURS:
            raise
        sys.exit(
            f"scripts/{name}: this Python ({sys.executable}) has no {missing.name}; "
            f"`scripts/setup bench` makes one that has: .venv/bin/python scripts/{name}"
        )
