"""What was measured on this machine, on disk: one folder, a file for each run that measured something.

A file is named for what its times depend on (GPU, compute capability, torch, triton and this package) and for the run
that wrote it. Nobody writes another run's file, and a file appears whole or not at all, so any number of processes
may write at once and none waits; who reads takes all files of its versions, later ones first. Nothing here is needed
to run: whatever is missing or unreadable is a complaint in words, and the shipped tables and the cost model remain.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from ..version import __version__ as OURS
from . import tables
from .target import Target

VARIABLE = "FUSED_RESNET_CACHE_DIR"
"""Names another folder than the user's cache."""
MOST_SAID = 2
"""Of the files that are passed over, so many are named by the warning; ``python -m fused_resnet env`` names all."""


@dataclass(frozen=True)
class Identity:
    """What a measurement belongs to."""

    gpu: str
    capability: int
    torch: str = torch.__version__
    triton: str = triton.__version__
    fused_resnet: str = OURS

    @property
    def names(self) -> tuple[str, ...]:
        return self.gpu, self.torch, self.triton, self.fused_resnet

    @property
    def stem(self) -> str:
        """As the beginning of a file's name."""
        gpu = "-".join(re.findall(r"[a-z0-9]+", self.gpu.lower()))
        return f"{gpu}-sm{self.capability}{_versions(self)}"


def identity(target: Target) -> Identity:
    return Identity(target.name, target.sm)


@dataclass
class Remembered:
    """A table as it lies on disk and travels between processes: ``entries`` and ``routes`` are JSON's own types."""

    identity: Identity
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    routes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, other: Remembered) -> None:
        """Takes over what ``other`` has; its times replace those for the same pass."""
        for key, passes in other.entries.items():
            self.entries.setdefault(key, {}).update(passes)
        self.routes.update(other.routes)

    def to_dict(self) -> dict[str, Any]:
        return {"version": tables.VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Remembered:
        """One of ``tables.DAMAGED`` where it is not such a document, in whatever detail."""
        if document["version"] != tables.VERSION:
            raise ValueError(f"a table of version {document['version']}, not {tables.VERSION}")
        tables.parse(document)
        tables.parse_routes(document)
        identity = Identity(**document["identity"])
        if type(identity.capability) is not int or not all(isinstance(name, str) for name in identity.names):
            raise ValueError(f"measured on {document['identity']}")
        return cls(identity, dict(document["entries"]), dict(document["routes"]))


def folder() -> Path:
    """Where measurements lie: the environment's ``FUSED_RESNET_CACHE_DIR``, or ``fused_resnet`` in the user's cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute() / "tuned"  # of an unknown user, a folder of that very name
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification has it
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fused_resnet" / "tuned"


def read(place: Path | None = None) -> tuple[list[Remembered], list[str]]:
    """What this environment's versions measured, one table a GPU, and what was passed over and why."""
    found: dict[Identity, Remembered] = {}
    complaints = []
    place = place or folder()
    mine = _versions(Identity("", 0))
    for path in sorted(path for path in place.glob("*.json") if f"{mine}.run" in path.name):
        try:
            table = Remembered.from_dict(json.loads(path.read_text()))
        except OSError as error:
            complaints.append(f"{path.name} cannot be read ({error.strerror})")
        except tables.DAMAGED as error:
            complaints.append(f"{path.name} is damaged ({type(error).__name__}: {str(error)[:80]})")
        else:
            if path.name.startswith(f"{table.identity.stem}.run"):
                found.setdefault(table.identity, Remembered(table.identity)).add(table)
            else:
                complaints.append(f"{path.name} was measured elsewhere ({table.identity.stem})")
    return list(found.values()), complaints


_loading = threading.Lock()
_loaded = threading.Event()


def load() -> None:
    """Puts what was measured on this machine before the shipped tables: once a process, never under a compiler's
    tracing, which a file or a warning would disturb. Modules call it as they are made. Says once what was passed over.
    """
    if _loaded.is_set() or torch.compiler.is_compiling():
        return
    with _loading:
        if _loaded.is_set():
            return
        found, complaints = read()
        for table in found:
            tables.install(table.identity.gpu, table.identity.capability, table.to_dict())
        _loaded.set()
    if len(complaints) > MOST_SAID:
        complaints[MOST_SAID:] = [f"{len(complaints) - MOST_SAID} more files"]
    passed_over = [*tables.COMPLAINTS, *([f"{'; '.join(complaints)}, in {folder()}"] if complaints else [])]
    if passed_over:
        warnings.warn(
            f"fused_resnet passes over {'; '.join(passed_over)}. Plans follow what other tables there are, "
            "and the cost model; fused_resnet.warmup(..., tune=True) measures again",
            stacklevel=3,
        )


def forget() -> None:
    """As if nothing had been loaded: the next :func:`load` reads again."""
    with _loading:
        tables.uninstall()
        _loaded.clear()


def new_run() -> str:
    """A name that no other run has, and that later ones follow."""
    return f"run{time.time_ns():020d}-{os.getpid()}"


def write(table: Remembered, run: str, place: Path | None = None) -> Path:
    """The file of ``run``, written over whole. OSError where that is not possible."""
    place = place or folder()
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{table.identity.stem}.{run}.json"
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".part", dir=place)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(table.to_dict(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return path


def _versions(identity: Identity) -> str:
    return f"-torch{identity.torch}-triton{identity.triton}-{identity.fused_resnet}"
