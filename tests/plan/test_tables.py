"""Tables of measured choices: keys, the nearest thing measured, and who won."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fused_resnet.plan import tables
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import H100

pytestmark = pytest.mark.quick

PROBLEM = ConvProblem(256, 14, 14, 256, 1024)
CONFIG = GemmConfig(128, 128, 64, 8, 4)


def entry(us: float | None = 10.0, vendor_us: float | None = 12.0, **more: Any) -> dict[str, Any]:
    return {"config": CONFIG.to_dict(), "us": us, "vendor_us": vendor_us, "passes_us": 0.0, "source": "test"} | more


def table(**passes: dict[str, Any]) -> dict[str, tables.Table]:
    named = {name.replace("_", "+"): raw for name, raw in passes.items()}
    return {"h100": tables.parse({"version": tables.VERSION, "entries": {tables.problem_key(PROBLEM): named}})}


def test_the_fastest_wins() -> None:
    found = tables.lookup(PROBLEM, "fprop", "h100", table(fprop=entry(10, 12)))
    assert found is not None and found.config == CONFIG and not found.vendor_wins
    found = tables.lookup(PROBLEM, "fprop", "h100", table(fprop=entry(10, 7, passes_us=2)))
    assert found is not None and found.config is None and found.ours == CONFIG and found.vendor_wins
    found = tables.lookup(PROBLEM, "fprop", "h100", table(fprop=entry(10, 7, passes_us=4)))
    assert found is not None and found.config == CONFIG
    found = tables.lookup(PROBLEM, "fprop", "h100", table(fprop=entry(None, 7, config=None)))
    assert found is not None and found.config is None
    assert "none correct" in found.reason and "7 us" in found.reason


def test_a_variant_stands_in_for_another_of_its_pass() -> None:
    both = table(fprop_out=entry(1), fprop_in_out=entry(2), wgrad=entry(3))
    assert tables.lookup(PROBLEM, "fprop", H100, both).us == 1  # type: ignore[union-attr]
    assert tables.lookup(PROBLEM, "fprop+in", H100, both).us == 2  # type: ignore[union-attr]
    assert tables.lookup(PROBLEM, "fprop+in+out", H100, both).us == 2  # type: ignore[union-attr]
    assert tables.lookup(PROBLEM, "wgrad+in", H100, both).us == 3  # type: ignore[union-attr]
    assert tables.lookup(PROBLEM, "dgrad", H100, both) is None


def test_nothing_stands_in_for_a_gram_pass() -> None:
    assert tables.pass_name("dgrad", gram=True) == "dgrad+gram"
    assert tables.lookup(PROBLEM, "dgrad+gram", H100, table(dgrad=entry(), dgrad_in_out=entry())) is None
    only = table(dgrad_gram=entry(3, None))
    assert tables.lookup(PROBLEM, "dgrad", H100, only) is None
    found = tables.lookup(PROBLEM, "dgrad+gram", H100, only)
    assert found is not None and found.config == CONFIG and "not measured" in found.reason


def test_the_nearest_batch_within_a_factor_of_four() -> None:
    measured = table(fprop=entry())
    assert tables.lookup(replace(PROBLEM, N=64), "fprop", "h100", measured) is not None
    assert tables.lookup(replace(PROBLEM, N=1024), "fprop", "h100", measured) is not None
    assert tables.lookup(replace(PROBLEM, N=32), "fprop", "h100", measured) is None
    assert tables.lookup(replace(PROBLEM, Ci=128), "fprop", "h100", measured) is None


def test_an_odd_key_is_nobody_s_neighbour() -> None:
    key = tables.problem_key(PROBLEM).replace("N256-", "Nmany-")
    odd = {"h100": tables.parse({"version": tables.VERSION, "entries": {key: {"fprop": entry()}}})}
    assert tables.lookup(PROBLEM, "fprop", "h100", odd) is None


def test_what_names_a_problem() -> None:
    assert tables.problem_key(PROBLEM) == tables.problem_key(replace(PROBLEM, dtype="float16"))
    sizes: list[dict[str, Any]] = [{name: 5} for name in ("N", "H", "W", "Ci", "Co", "R", "S", "groups")]
    pairs = [{"stride": (2, 1)}, {"padding": (1, 0)}, {"dilation": (1, 2)}, {"dtype": "float32"}]
    others = [replace(PROBLEM, **change) for change in [*sizes, *pairs]]
    assert len({tables.problem_key(p) for p in [PROBLEM, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Some GPU", "some-gpu"),
    ],
)
def test_the_name_of_a_table(name: str, slug: str) -> None:
    assert tables.gpu_slug(name) == slug


def test_another_version_is_no_table() -> None:
    assert not tables.parse({"version": tables.VERSION + 1, "entries": {"x": {"fprop": entry()}}})
    assert tables.lookup(PROBLEM, "fprop", "no such gpu") is None


def test_a_pass_has_a_name() -> None:
    assert tables.pass_name("dgrad", prologue=True, epilogue=True) == "dgrad+in+out"
    with pytest.raises(ValueError, match="kind"):
        tables.pass_name("forward")


def test_what_ships_parses() -> None:
    for gpu, shipped in tables.TABLES.items():
        assert gpu == tables.gpu_slug(gpu) and shipped
        for passes in shipped.values():
            for name, found in passes.items():
                assert name.partition("+")[0] in tables.KINDS
                assert found.us is None or found.us > 0
