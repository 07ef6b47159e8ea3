"""The table of timm's models in the docs is what conversion does to each of them."""

from __future__ import annotations

import pytest

timm = pytest.importorskip("timm")
import timm_table  # noqa: E402

GROUPS = "kept: GroupNorm is no normalisation that is fused"


def test_the_page_holds_what_conversion_does() -> None:
    page = timm_table.PAGE.read_text()
    if f"timm {timm.__version__}:" not in page:
        pytest.skip(f"the table was made with another timm than {timm.__version__}")
    assert timm_table.updated(page) == page, "run scripts/timm_table.py"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resnet18", "| `resnet18` | one operation | 8 × one operation |"),
        ("resnet50_gn", f"| `resnet50_gn` | {GROUPS} | 16 × {GROUPS} |"),
    ],
)
def test_lines(name: str, line: str) -> None:
    assert timm_table.row(name) == line


@pytest.mark.quick
def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="timm:begin"):
        timm_table.updated("nothing")
