"""The architecture, kept true: imports point downward, the lower layers read no environment, importing asks nothing.

modules -> families -> functional -> autograd -> plan -> launch -> kernels        reference: a leaf, beside them all
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parent.parent / "fused_resnet"

MAY_IMPORT = {
    "kernels": {"kernels"},
    "reference": {"reference"},
    "version": set(),
    "plan": {"plan", "version"},
    # launchers take the frozen descriptions that plan/ makes; they never ask it to decide
    "launch": {"alike", "launch", "kernels", "plan"},
    "autograd": {"alike", "autograd", "launch", "plan", "reference"},
    "alike": set(),
    "arguments": set(),
    "layout": set(),
    "plain": {"arguments", "reference"},
    "calls": {"arguments", "autograd", "plain", "plan"},
    "functional": {"calls", "alike", "arguments", "autograd", "layout", "plain", "plan"},
    "families": {"arguments", "calls", "families", "functional", "plan"},
    "modules": {"modules", "families", "functional", "reference"},
    "convert": {"convert", "explain", "modules", "families", "functional", "plan", "reference"},
}
"""What each layer may import of the package; whatever is not listed here (explain, __main__, ...) stands on top."""

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_of(path: Path) -> tuple[str, ...]:
    """``("plan", "config")``; a package is its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, ...]]:
    """The modules of the package that an import statement names, as paths inside the package."""
    if isinstance(node, ast.Import):
        names = [tuple(alias.name.split(".")) for alias in node.names]
    else:
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            package = path.relative_to(PACKAGE.parent).parent.parts
            module = package[: len(package) - node.level + 1] + module
        names = [(*module, alias.name) for alias in node.names]
    for name in names:
        if name[0] != PACKAGE.name:
            continue
        inside = name[1:]
        while inside and not (
            PACKAGE.joinpath(*inside).with_suffix(".py").exists() or PACKAGE.joinpath(*inside).is_dir()
        ):
            inside = inside[:-1]  # a name inside a module
        yield inside


def imports(path: Path) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in imported(path, node):
                yield node, module


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"


def test_imports_point_downward():
    upward = []
    for path in FILES:
        layer = module_of(path)[:1]
        allowed = MAY_IMPORT.get(layer[0]) if layer else None
        for node, module in imports(path):
            if allowed is not None and (not module or module[0] not in allowed):
                upward.append(f"{where(path, node)} imports {'.'.join(module) or 'the package itself'}")
    assert not upward, "\n".join(dict.fromkeys(upward))


def test_no_circles():
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path in FILES:
        # a package's __init__ depends on what it re-exports, not the other way round
        graph[module_of(path)] = {module for _, module in imports(path)} - {module_of(path)}
    list(TopologicalSorter(graph).static_order())


def test_nothing_of_the_package_is_imported_inside_a_function():
    hidden = []
    for path in FILES:
        for function in ast.walk(TREES[path]):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import | ast.ImportFrom) and list(imported(path, node)):
                        hidden.append(where(path, node))
    assert not hidden, f"imports that dodge a circle: {hidden}"


def test_kernels_import_triton_alone():
    for path in FILES:
        if module_of(path)[:1] != ("kernels",):
            continue
        for node in ast.walk(TREES[path]):
            roots = []
            if isinstance(node, ast.Import):
                roots = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = [(node.module or "").split(".")[0]]
            assert set(roots) <= {"triton", "__future__"}, f"{where(path, node)} imports {roots}"


def test_no_environment_is_read_below_plan():
    reads = []
    for path in FILES:
        if module_of(path)[:1] not in (("launch",), ("kernels",), ("reference",)):
            continue
        for node in ast.walk(TREES[path]):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("environ", "getenv", "environb"):
                reads.append(where(path, node))
    assert not reads


def test_launch_mirrors_kernels():
    """A kernel file that holds kernels has a launcher file of its name; helpers have none."""
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        functions = [node.name for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]
        if any(name.endswith("_kernel") for name in functions):
            assert (PACKAGE / "launch" / path.name).exists(), f"no launcher file for {path.name}"


def test_public_names_are_listed():
    tree = TREES[PACKAGE / "__init__.py"]
    names = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    public = {name for name in names if not name.startswith("_")} - {"annotations"}
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(node)
    )
    assert len(listed) == len(set(listed))
    assert public <= set(listed), f"imported and not in __all__: {public - set(listed)}"


IMPORT_AND_WATCH = """
    import os, sys
    import torch, triton

    def refuse(*args, **kwargs):
        raise AssertionError("importing asked a device")

    for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
                 "get_device_name", "_lazy_init"):
        setattr(torch.cuda, name, refuse)

    reads = []
    original = type(os.environ).__getitem__

    def watched(self, key):
        reader = sys._getframe(1)
        while reader.f_code.co_filename == os.__file__ or "_collections_abc" in reader.f_code.co_filename:
            reader = reader.f_back
        if reader.f_code.co_filename.startswith(sys.argv[1]):
            reads.append((reader.f_code.co_filename, reader.f_lineno, key))
        return original(self, key)

    type(os.environ).__getitem__ = watched
    import fused_resnet
    assert not reads, reads
    print(len(fused_resnet.__all__))
"""


def test_importing_reads_no_environment_and_asks_no_device():
    script = textwrap.dedent(IMPORT_AND_WATCH)
    done = subprocess.run(
        [sys.executable, "-c", script, str(PACKAGE)], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
