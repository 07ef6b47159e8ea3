"""What scripts/tune measures and in which order; it fits its time, goes on where it was, and ships what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fused_resnet as fr
from benchmarks import family, harness, passes, problems, ship
from benchmarks.device import ROOT, DryDevice
from benchmarks.stages import tune
from fused_resnet.explain import image_like
from fused_resnet.plan import planner, store, tables
from fused_resnet.plan.defaults import choices
from fused_resnet.plan.target import H100, INTERPRETER
from fused_resnet.tuning.tune import chains_of
from tests.shipped import NETWORKS

quick = pytest.mark.quick


@quick
def test_resnet_50_goes_first_then_what_should_gain_most() -> None:
    found = family.work(family.FAMILY, H100)
    assert len({work.name for work in found}) == len(found) > 1000
    mine = {name for layer in problems.layers(50) for name in map(family.name_of, family.cases(layer))}
    mine |= {family.name_of_chain(chain) for chain in problems.blocks(50)}
    mine |= {case.name for case in passes.cases(dry=False) if case.kind in passes.TILED}
    assert {work.name for work in found[: len(mine)]} == mine
    later = [work.gain for work in found[len(mine) :]]
    assert later == sorted(later, reverse=True) and later[0] > 0
    kinds = [0 if work.case else 1 if work.chain else 2 for work in found[: len(mine)]]
    assert kinds == sorted(kinds), "routes are measured with the configurations found before"
    assert set(kinds) == {0, 1, 2} and not any(work.over_memory for work in found[len(mine) :])


@quick
def test_the_family_is_whole() -> None:
    assert {network.batch for network in family.FAMILY} == {32, 64, 128, 256, 512}
    assert {network.depth for network in family.FAMILY} == {18, 34, 50, 101, 152}
    kinds = {(network.depth, network.base_width, network.groups) for network in family.FAMILY}
    assert kinds >= {(50, 128, 1), (101, 128, 1), (50, 4, 32), (101, 8, 32), (101, 4, 64)}
    assert all(network.dtype in ("bfloat16", "float16") for network in family.FAMILY)
    assert family.FAMILY[0] == family.FIRST == family.Network(50, 256)


@quick
@pytest.mark.parametrize(
    ("build", "more"), [(fr.resnet18, {}), (fr.resnext50_32x4d, {"base_width": 4, "groups": 32})], ids=["18", "next"]
)
def test_the_blocks_are_those_of_the_network(build: Any, more: dict[str, int]) -> None:
    """Those that the models of this package make."""
    depth = 18 if build is fr.resnet18 else 50
    model = build().to("meta")
    images = [image_like((2, 3, 64, 64), torch.bfloat16)]
    expected = chains_of(model, images, torch.bfloat16, True, H100)
    expected = Counter({chain: count for chain, count in expected.items() if len(chain.convs) > 1})
    assert problems.blocks(depth, 2, 64, **more) == expected


@quick
def test_a_gain_follows_what_was_measured() -> None:
    case = next(work.case for work in family.work((family.FIRST,), H100) if work.case and work.case.kind == "dgrad")
    entry = tables.lookup(case.problem, case.variant, H100)
    assert entry is not None and entry.us is not None and entry.floor_us is not None
    assert family.predicted_gain_us(case, H100) == pytest.approx(entry.us - entry.floor_us)
    unknown = replace(case, problem=replace(case.problem, H=5, W=5))
    assert family.predicted_gain_us(unknown, H100) > 0


def _tile(config: Any) -> tuple[Any, ...]:
    fields = config.to_dict()
    return tuple(value for name, value in fields.items() if name != "split")


@quick
def test_whatever_the_family_would_run_unmeasured_is_compiled_by_the_audit() -> None:
    """Its tile, for a filter and a stride like that: the audit compiles all choices of the networks that it knows."""
    audited = set()
    for network in NETWORKS:
        for layer in problems.layers(**network):
            p = layer.problem
            for kind in ("fprop", "dgrad", "wgrad"):
                audited |= {(kind, p.R, p.stride, _tile(config)) for config in choices(p, kind, H100)}
    chosen = set()
    for network in family.FAMILY:
        for layer in problems.layers(*network):
            p = layer.problem
            if p.groups == 1 and layer.role != "stem":
                for kind in ("fprop", "dgrad", "wgrad"):
                    chosen.add((kind, p.R, p.stride, _tile(planner.default_config(p, kind, H100))))
    assert len(chosen) > 20 and chosen <= audited


def scripts_tune(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/tune", "--dry", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def context(out: Path, limit: int = 0) -> harness.Context:
    return harness.Context("tune", out, time.time() + 300, out / "marker", DryDevice(), limit)


def test_passes_and_routes_are_measured_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage itself, on a pass, one of boxes, one over memory and two blocks, one of them with groups; then again,
    with nothing left to do."""
    found = family.work(family.TINY, tune.target_of(context(tmp_path)))
    blocks = [work for work in found if work.chain is not None]
    groups = next(work for work in blocks if any(conv.groups > 1 for conv in work.chain.convs))  # type: ignore[union-attr]
    box = next(
        w for w in found if w.case and w.case.problem.is_same_3x3 and w.case.kind == "dgrad" and w.case.problem.H == 4
    )
    memory = next(work for work in found if work.over_memory is not None)
    few = [next(work for work in found if work.case is not None), box, memory, blocks[0], groups]
    monkeypatch.setattr(family, "work", lambda *_: few)
    stage = context(tmp_path)
    assert stage.run(tune.items(stage)) == 0
    assert list(stage.results) == [work.name for work in few]
    assert not any("error" in result for result in stage.results.values()), stage.results
    assert any("'box'" in config for config in stage.results[box.name]["heats_us"]), stage.results[box.name]
    measured = stage.results[memory.name]
    assert measured["rule"] in measured["heats_us"] and len(measured["heats_us"]) > 1
    for work in blocks[:1] + [groups]:
        times = stage.document["routes"][tables.chain_key(work.chain)]["us"]  # type: ignore[arg-type]
        assert {"staged", "reference"} <= set(times)
    assert len(stage.document["entries"]) == 2
    assert not list(tune.items(context(tmp_path)))
    store.forget()


class OnAGpu(DryDevice):
    """The CPU, where the stage does what only a GPU's run does."""

    dry = False


class Compiled:
    """In place of the processes that compile ahead: the second tile of each pass does not compile."""

    jobs: ClassVar[list[Any]] = []

    def __init__(self, jobs: Any, capability: int) -> None:
        self.jobs[:] = jobs

    def add(self, jobs: Any) -> None:
        self.jobs.extend(jobs)

    def wait(self, case: Any, config: Any, timeout: float) -> str:
        return "it does not compile" if config != case.config() else ""

    def stop(self) -> None:
        pass


def test_tiles_of_passes_over_memory_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [next(work for work in family.work(family.TINY, INTERPRETER) if work.over_memory)]
    monkeypatch.setattr(family, "work", lambda *_: few)
    monkeypatch.setattr(tune, "Ahead", Compiled)
    monkeypatch.setattr(tune, "target_of", lambda context: INTERPRETER)
    stage = harness.Context("tune", tmp_path, time.time() + 300, tmp_path / "marker", OnAGpu())
    assert stage.run(tune.items(stage)) == 0
    case, result = few[0].over_memory, stage.results[few[0].name]
    assert [config for _, config in Compiled.jobs] == case.candidates()  # type: ignore[union-attr]
    assert list(result["heats_us"]) == [result["rule"]] and list(result["refused"].values()) == ["it does not compile"]
    assert "1 tried, 1 refused, 0 WRONG" in result["line"]
    store.forget()


@pytest.mark.slow
def test_the_command_fits_its_time_prints_each_result_and_goes_on(tmp_path: Path) -> None:
    first = scripts_tune(tmp_path, "--minutes", "0.35")
    assert first.returncode == 0, first.stderr
    done = json.loads((tmp_path / "tuned.json").read_text())
    assert done["results"] and "out of time before" in first.stdout
    for name, result in done["results"].items():
        assert "error" not in result, (name, result)
        assert f"[tune] {name}: " in first.stdout
    again = scripts_tune(tmp_path, "--minutes", "0.35")
    more = json.loads((tmp_path / "tuned.json").read_text())["results"]
    assert set(done["results"]) < set(more)
    assert not any(f"[tune] {name}: " in again.stdout for name in done["results"])


@quick
def test_what_is_shipped_holds_routes_too(tmp_path: Path) -> None:
    route = {"us": {"staged": 3.0, "gram": 2.0}, "source": "a test"}
    entry = {"config": None, "us": None, "vendor_us": 5.0, "passes_us": 0.0, "floor_us": 4.0, "source": "a test"}
    document: dict[str, Any] = {"version": tables.VERSION, "gpu": "NVIDIA H100", "facts": {"commit": "abc"}}
    document |= {"entries": {"one": {"fprop": entry}}, "routes": {"a block": route}}
    source = tmp_path / "tuned.json"
    source.write_text(json.dumps(document))
    ship.ship(source, tmp_path / "shipped")
    document["routes"] = {"another": route}
    source.write_text(json.dumps(document))
    written = json.loads(ship.ship(source, tmp_path / "shipped").read_text())
    assert set(tables.parse_routes(written)) == {"a block", "another"}
    assert tables.parse(written)["one"]["fprop"].vendor_us == 5.0


@quick
def test_what_was_measured_at_no_known_commit_is_not_shipped(tmp_path: Path) -> None:
    source = tmp_path / "tuned.json"
    document = {"version": tables.VERSION, "gpu": "NVIDIA H100", "facts": {"commit": ""}, "entries": {"one": {}}}
    source.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="does not say at which commit"):
        ship.ship(source, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


@quick
@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"version": 1}', '{"version": 1, "entries": {"a": {"fprop": 3}}}']
)
def test_what_is_no_table_is_not_shipped(content: str | None, tmp_path: Path) -> None:
    source = tmp_path / "tuned.json"
    if content is not None:
        source.write_text(content)
    with pytest.raises(SystemExit, match=r"tuned.json (holds no table|cannot be read) ") as refused:
        ship.main(["--ship", str(source)])
    assert "\n" not in str(refused.value)


@quick
def test_a_rehearsal_is_not_shipped(tmp_path: Path) -> None:
    entry = {"config": None, "us": None, "vendor_us": 5.0, "passes_us": 0.0, "floor_us": 4.0, "source": "a test"}
    facts = DryDevice().facts()
    document = {"version": tables.VERSION, "gpu": facts["gpu"], "facts": facts, "entries": {"one": {"fprop": entry}}}
    (tmp_path / "tuned.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="is a rehearsal's, which measures nothing"):
        ship.ship(tmp_path / "tuned.json", tmp_path / "shipped")


@quick
def test_shipping_over_a_damaged_table_makes_a_new_one(tmp_path: Path) -> None:
    entry = {"config": None, "us": None, "vendor_us": 5.0, "passes_us": 0.0, "floor_us": 4.0, "source": "a test"}
    document = {"version": tables.VERSION, "gpu": "NVIDIA H100", "facts": {"commit": "abc"}}
    (tmp_path / "tuned.json").write_text(json.dumps({**document, "entries": {"one": {"fprop": entry}}}))
    (tmp_path / "h100.json").write_text(json.dumps({**document, "entries": {"two": {"fprop": 3}}}))
    written = json.loads(ship.ship(tmp_path / "tuned.json", tmp_path).read_text())
    assert set(tables.parse(written)) == {"one"}


@quick
def test_no_shipped_reason_has_an_empty_field() -> None:
    entries = [entry for table in tables.TABLES.values() for passes in table.values() for entry in passes.values()]
    sources = [entry.source for entry in entries]
    sources += [times.source for routes in tables.ROUTES.values() for times in routes.values()]
    assert entries and all(all(source.split(", ")) for source in sources)
