"""How the commands in scripts/ start: what a Python lacks for them is one sentence. Needs no other module itself."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

OURS = {"benchmarks", "fused_resnet"}


def run(name: str, module: str) -> NoReturn:
    """Ends with what the ``main`` of ``module`` returns, as ``scripts/<name>``; stopped by Ctrl-C with 130."""
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] in OURS:
            raise
        sys.exit(
            f"scripts/{name}: this Python ({sys.executable}) has no {missing.name}; "
            f"`scripts/setup bench` makes one that has: .venv/bin/python scripts/{name}"
        )
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\nscripts/{name}: stopped", file=sys.stderr)
        sys.exit(130)
