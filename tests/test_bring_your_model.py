"""The page "Bring your model": its snippets run, and print what stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fused_resnet as fr

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "bring_your_model.md"
FENCE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.M | re.S)
SECTIONS = [part for part in re.split(r"^(?=## )", PAGE.read_text(), flags=re.M) if "```python" in part]
IMPORTS = "import timm\nimport torch\nimport torchvision\n\nimport fused_resnet as fr\n"


def title(section: str) -> str:
    return section.partition("\n")[0].removeprefix("## ")


@pytest.mark.parametrize("section", SECTIONS, ids=title)
def test_snippets(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In plain PyTorch: whole ResNets in the interpreter would take minutes."""
    for library in ("timm", "torchvision", *(["transformers"] if "transformers" in section else [])):
        pytest.importorskip(library)
    names: dict[str, Any] = {"__name__": __name__}
    exec(IMPORTS, names)
    with fr.use_route("reference") if "example_input" not in section else fr.use_route("auto"):
        for fence in FENCE.finditer(section):
            exec(compile(fence["code"], str(PAGE), "exec"), names)
            printed = capsys.readouterr().out
            assert fence["printed"] is None or printed == fence["printed"]


def test_the_readmes_snippets(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    readme = (ROOT / "README.md").read_text()
    assert "fr.convert(" in readme and "docs/bring_your_model.md" in readme
    for fence in FENCE.finditer(readme):
        exec(fence["code"].replace('"cuda"', '"cpu"'), {})
    assert "17 of them fused now, 0 kept" in capsys.readouterr().out
