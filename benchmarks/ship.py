"""The command behind ``scripts/tune``: the tune stage on its own, and its table into the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import harness
from .device import ROOT

TUNED = ROOT / "fused_resnet" / "plan" / "tuned"


def shipped(document: dict[str, Any]) -> dict[str, Any]:
    """What goes into the package of a tune stage's file: the choices and where they come from, not every sample."""
    keep = ("gpu", "driver", "torch", "triton", "cuda", "cudnn", "commit", "date")
    facts = {key: document["facts"].get(key) for key in keep}
    found = {name: document.get(name, {}) for name in ("entries", "routes")}
    return {"version": document["version"], "gpu": document["gpu"], "facts": facts, **found}


def ship(source: Path, folder: Path = TUNED) -> Path:
    """Writes the table of ``source`` to ``folder``/<gpu>.json, over what was there for the same passes only."""
    from fused_resnet.plan.tables import DAMAGED, VERSION, gpu_slug, parse, parse_routes

    try:
        document = json.loads(source.read_text())
        if document["version"] != VERSION or not parse(document):
            raise SystemExit(f"{source} holds no table of version {VERSION}")
        parse_routes(document)
        measured_at = document["facts"].get("commit")
    except OSError as error:
        raise SystemExit(f"{source} cannot be read ({error.strerror})") from None
    except DAMAGED as error:
        raise SystemExit(f"{source} holds no table ({type(error).__name__}: {str(error)[:80]})") from None
    if document["facts"].get("dry"):
        raise SystemExit(f"{source} is a rehearsal's, which measures nothing")
    if not measured_at:
        raise SystemExit(f"{source} does not say at which commit it was measured; measure again")
    table = shipped(document)
    target = folder / f"{gpu_slug(document['gpu'])}.json"
    before = harness.read(target) or {}
    try:
        known = bool(parse(before) or parse_routes(before))
    except DAMAGED:  # nobody reads that table either
        known = False
    if known:
        entries = dict(before["entries"])
        for key, passes in table["entries"].items():
            entries[key] = {**entries.get(key, {}), **passes}
        table["entries"] = entries
        table["routes"] = {**before.get("routes", {}), **table["routes"]}
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(_compact(table))
    return target


def _compact(table: dict[str, Any]) -> str:
    """JSON with a line per pass and per block: a diff of two tables reads well."""
    lines = []
    for key, passes in sorted(table["entries"].items()):
        rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(passes.items()))
        lines.append(f"  {json.dumps(key)}: {{\n{rows}}}")
    head = {name: value for name, value in table.items() if name not in ("entries", "routes")}
    routes = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(table["routes"].items()))
    text = json.dumps(head)[:-1] + ', "entries": {\n' + ",\n".join(lines) + "\n}"
    return text + (f', "routes": {{\n{routes}\n}}' if routes else "") + "}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tune",
        description="Measures candidate configurations of every convolution of the ResNet family on this GPU, and each "
        "block by its routes: ResNet-50 at batch 256 first, then what should gain most. Writes "
        "fused_resnet/plan/tuned/<gpu>.json. Interrupted, or out of time, it goes on where it was when called again.",
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "tune", help="folder of the full measurements")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already in --out")
    parser.add_argument("--ship", type=Path, metavar="TUNED.json", help="measure nothing: ship this file's table")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU; measures and ships nothing")
    options = parser.parse_args(argv)
    if options.ship is not None:
        print(f"wrote {ship(options.ship)}")
        return 0
    arguments = ["--only", "facts,tune", "--out", str(options.out), "--minutes", str(options.minutes)]
    arguments += ["--stage-minutes", f"tune={options.minutes}"] + ["--fresh"] * options.fresh + ["--dry"] * options.dry
    status = harness.main(arguments, prog="tune")
    if status == 0 and not options.dry:
        print(f"wrote {ship(options.out / 'tuned.json')}")
    return status
