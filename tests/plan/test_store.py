"""What was measured on this machine: where it lies, that nothing damages it, and that nothing damaged is believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet.__main__ import environment
from fused_resnet.plan import planner, store, tables
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.store import Identity, Remembered
from fused_resnet.plan.target import H100, Assumption, Target, assume

pytestmark = pytest.mark.quick

HERE = replace(H100, name="NVIDIA H100 80GB HBM3")
OTHER = replace(H100, name="NVIDIA Somewhat Else", sm=100)
LAST = ConvProblem(32, 14, 14, 128, 512)
CHAIN = ChainProblem((replace(LAST, Ci=512, Co=128), LAST), residual="identity")
CONFIG = GemmConfig(64, 64, 64, 4, 2)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    store.forget()
    yield tmp_path / "tuned"
    store.forget()


def entry(us: float = 10.0, vendor_us: float = 99.0) -> dict[str, Any]:
    return {"config": CONFIG.to_dict(), "us": us, "vendor_us": vendor_us, "passes_us": 0.0, "source": "a test"}


def remembered(target: Target = HERE, **routes: float) -> Remembered:
    table = Remembered(store.identity(target), {tables.problem_key(LAST): {"fprop+in+out": entry()}})
    if routes:
        table.routes[tables.chain_key(CHAIN)] = {"us": routes, "source": "a test"}
    return table


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.folder() == tmp_path / "tuned"
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.folder() == tmp_path / "xdg" / "fused_resnet" / "tuned"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.folder() == tmp_path / ".cache" / "fused_resnet" / "tuned"
    monkeypatch.setenv(store.VARIABLE, "~nobody-has-this-name/here")
    assert store.folder().parts[-3:] == ("~nobody-has-this-name", "here", "tuned")


def test_what_is_written_is_read_and_later_runs_go_first(place: Path) -> None:
    first = remembered(gram=1.0)
    store.write(first, store.new_run())
    second = remembered()
    second.entries[tables.problem_key(LAST)]["fprop+in+out"]["us"] = 7.0
    second.entries["another"] = {"dgrad": entry()}
    store.write(second, store.new_run())
    store.write(remembered(OTHER), store.new_run())
    found, complaints = store.read()
    assert not complaints and len(found) == 2
    (both,) = (table for table in found if table.identity.gpu == HERE.name)
    assert both.routes == first.routes and set(both.entries) == {tables.problem_key(LAST), "another"}
    assert both.entries[tables.problem_key(LAST)]["fprop+in+out"]["us"] == 7.0
    assert not list(place.glob("*.part"))


def test_a_run_writes_over_its_own_file_alone(place: Path) -> None:
    run = store.new_run()
    store.write(remembered(), run)
    store.write(remembered(staged=2.0), run)
    assert len(list(place.iterdir())) == 1 and store.read()[0][0].routes
    assert store.new_run() > run


def test_what_other_versions_measured_is_not_looked_at(place: Path) -> None:
    table = remembered()
    for change in ({"torch": "1.0"}, {"triton": "1.0"}, {"fused_resnet": "0.0.1"}):
        store.write(Remembered(replace(table.identity, **change), table.entries), store.new_run())
    assert store.read() == ([], []) and len(list(place.iterdir())) == 3


def test_a_failed_write_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.new_run()
    store.write(remembered(), run)

    def refuse(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        store.write(remembered(staged=2.0), run)
    assert len(list(place.iterdir())) == 1 and not store.read()[0][0].routes


def spoil(path: Path, how: str) -> None:
    document = json.loads(path.read_text())
    name = tables.problem_key(LAST)
    if how == "cut off":
        path.write_text(path.read_text()[:-40])
    elif how == "not text":
        path.write_bytes(b"\xff\xfe\x00")
    elif how == "empty":
        path.write_text("")
    elif how == "a deep one":
        path.write_text("[" * 200_000)
    else:
        found = document["entries"][name]["fprop+in+out"]
        if how == "a list":
            document = [document]
        elif how == "no entries":
            del document["entries"]
        elif how == "an unknown field":
            found["config"]["block_q"] = 3
        elif how in TILES:
            found["config"] |= TILES[how]
        elif how in TIMES:
            found["us"] = TIMES[how]
        elif how == "a route's time in words":
            document["routes"][tables.chain_key(CHAIN)]["us"]["gram"] = "fast"
        elif how == "a later format":
            document["version"] += 1
        elif how == "a foreign GPU":
            document["identity"]["gpu"] = "NVIDIA A100"
        elif how == "a GPU by number":
            document["identity"]["gpu"] = 5
        elif how == "foreign versions":
            document["identity"]["torch"] = "1.0"
        path.write_text(json.dumps(document))


TILES: dict[str, dict[str, Any]] = {
    "a tile in words": {"block_m": "64"},
    "a tile of halves": {"block_m": 64.0},
    "a tile of none": {"block_k": None},
    "a tile of three warps": {"num_warps": 3},
    "a tile of less than nothing": {"block_n": -64},
    "no part": {"split": 0},
    "an unknown form": {"form": "spiral"},
    "a flag in words": {"transposed": "yes"},
}
TIMES: dict[str, Any] = {"a time in words": "fast", "no number": float("nan"), "a list of times": [1.0]}
SPOILT = ("cut off", "not text", "empty", "a deep one", "a list", "no entries", "an unknown field", "a later format",
          "a GPU by number", "a route's time in words", *TILES, *TIMES)  # fmt: skip
FOREIGN = ("a foreign GPU", "foreign versions")


@pytest.mark.parametrize("how", [*SPOILT, *FOREIGN])
def test_a_damaged_or_foreign_file_is_passed_over_with_one_warning(place: Path, how: str) -> None:
    spoil(store.write(remembered(staged=1.0), store.new_run()), how)
    good = remembered(gram=3.0)
    store.write(good, store.new_run())
    with pytest.warns(UserWarning, match="damaged|elsewhere") as said:
        store.load()
    assert len(said) == 1 and str(place) in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.load()
    assert planner.plan_chain(CHAIN, HERE).reason.startswith("measured: gram 3 us")
    assert "passed over" in environment()


@pytest.mark.parametrize("how", ["cut off", "a deep one", "a list", "no entries", *TILES, *TIMES])
def test_a_damaged_table_that_ships_is_passed_over_with_one_warning(
    place: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is imported, other tables are followed, and modules say so as they are made."""
    path = store.write(remembered(staged=1.0), store.new_run())
    path.with_name("h200.json").write_text(path.read_text())
    spoil(path, how)
    path.rename(path.with_name("h100.json"))
    found = tables.shipped(place)
    assert set(found.tables) == set(found.routes) == {"h200"} and len(found.complaints) == 1
    for damaged in place.iterdir():
        damaged.unlink()
    monkeypatch.setattr(tables, "COMPLAINTS", found.complaints)
    with pytest.warns(UserWarning, match="passes over .*h100.json is damaged") as said:
        store.load()
    assert len(said) == 1 and "passed over" in environment()


def test_of_many_damaged_files_few_are_named(place: Path) -> None:
    for _ in range(5):
        spoil(store.write(remembered(), store.new_run()), "cut off")
    with pytest.warns(UserWarning, match="; 3 more files, in ") as said:
        store.load()
    assert str(said[0].message).count("is damaged") == 2 and environment().count("is damaged") == 5


def test_an_unreadable_folder_is_no_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(remembered(), store.new_run())

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match="cannot be read"):
        store.load()


def test_what_was_measured_here_goes_first(place: Path) -> None:
    before = planner.plan_conv(LAST, HERE, first=False).fprop
    assert before.config != CONFIG
    with assume(Assumption(HERE)):
        shipped = tables.lookup(replace(LAST, N=256, H=28, W=28), "fprop+in+out", HERE)
    assert shipped is not None, "what ships is still there"
    store.write(remembered(), store.new_run())
    store.load()
    assert planner.plan_conv(LAST, HERE, first=False).fprop.config == CONFIG
    assert tables.lookup(replace(LAST, N=256, H=28, W=28), "fprop+in+out", HERE) == shipped
    assert planner.plan_conv(LAST, OTHER, first=False).fprop.config != CONFIG, "another GPU's is another's"
    assert planner.plan_conv(LAST, H100, first=False).fprop == before, "a described GPU is not this one"
    store.forget()
    assert planner.plan_conv(LAST, HERE, first=False).fprop == before


@pytest.mark.parametrize(
    ("times", "route"),
    [
        ({"staged": 1.0, "gram": 2.0, "reference": 3.0}, "staged"),
        ({"staged": 3.0, "gram": 2.0, "reference": 4.0}, "gram"),
        ({"staged": 3.0, "gram": 2.0, "reference": 1.0}, "reference"),
        ({"single": 0.1, "staged": 3.0}, "staged"),
    ],
)
def test_the_fastest_route_that_the_chain_can_take(place: Path, times: dict[str, float], route: str) -> None:
    store.write(remembered(**times), store.new_run())
    store.load()
    plan = planner.plan_chain(CHAIN, HERE)
    assert plan.route == route and "measured" in plan.reason
    assert planner.plan_chain(CHAIN, HERE, "staged").route == "staged", "what is asked for is not overruled"
    assert "measured" not in planner.plan_chain(replace(CHAIN, relu=False), HERE).reason


def _write_many(folder: str, count: int) -> None:
    os.environ[store.VARIABLE] = folder
    run = store.new_run()
    table = remembered()
    for i in range(count):
        table.entries[f"{os.getpid()} {i}"] = {"fprop": entry()}
        store.write(table, run)


def test_two_processes_write_at_once_while_a_third_reads(place: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(place.parent), 20)) for _ in range(2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert store.read()[1] == []
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    (table,), complaints = store.read()
    assert not complaints and len(table.entries) == 2 * 20 + 1 and reads


class Reads:
    """Counts how often the folder is looked at, and refuses once told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.allowed, real = 0, True, store.read

        def counted(*arguments: Any) -> Any:
            assert self.allowed, "read under tracing"
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(store, "read", counted)


def test_making_a_module_reads_once_whatever_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    for make in (lambda: fr.Bottleneck(16, 4), lambda: fr.ConvBNReLU(4, 4, 1), lambda: fr.Stem(), fr.resnet18):
        store.forget()
        before = reads.count
        make()
        make()
        assert reads.count == before + 1


@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here")
def test_a_module_s_tables_are_read_before_a_compiler_traces_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is the one measured here; the damaged file beside it was mentioned when the module was made."""
    torch._dynamo.reset()
    store.write(remembered(staged=1.0), store.new_run())
    spoil(store.write(remembered(), store.new_run()), "cut off")
    reads = Reads(monkeypatch)
    with pytest.warns(UserWarning, match="damaged"):
        block = fr.Bottleneck(16, 4).to("meta").to(memory_format=torch.channels_last)
    reads.allowed = False
    x = torch.empty(2, 16, 8, 8, device="meta").contiguous(memory_format=torch.channels_last)
    with assume(Assumption(HERE)), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(block, fullgraph=True, backend="eager")(x)
    assert reads.count == 1


@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here")
def test_nothing_is_read_under_tracing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions alone, compiled before anything else: they follow the shipped tables, and later calls the user's."""
    torch._dynamo.reset()
    weight, bn = torch.ones(8, 8, 1, 1, device="meta"), fr.functional.batch_norm_of(torch.nn.BatchNorm2d(8).to("meta"))
    reads = Reads(monkeypatch)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return fr.functional.conv_bn_relu(x, weight, bn)

    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    with assume(Assumption(HERE)):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
        assert reads.count == 0
        layer(x)
    assert reads.count == 1


def test_env_shows_the_place(place: Path) -> None:
    assert f"nothing (in {place})" in environment()
    store.write(remembered(gram=1.0), store.new_run())
    assert f"{HERE.name}, 1 layers, 1 blocks (in {place})" in environment()


def test_the_variable_is_not_read_at_import() -> None:
    """A value that would fail if it were used: a folder nobody can have."""
    code = "import fused_resnet; from fused_resnet.plan import store; assert not store._loaded.is_set()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, store.VARIABLE: "/dev/null/x"}, timeout=300)
    assert done.returncode == 0


def test_an_identity_names_its_file() -> None:
    found = Identity("NVIDIA H100 80GB HBM3", 90, "2.11.0+cu130", "3.6.0", "0.1.0")
    assert found.stem == "nvidia-h100-80gb-hbm3-sm90-torch2.11.0+cu130-triton3.6.0-0.1.0"
