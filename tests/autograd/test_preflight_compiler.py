"""The preflight's own call of Triton's compiler, without a GPU: a driver that only names one.

Were that call wrong, every plan would be refused on a GPU and plain PyTorch would run; so it is made here, for whole
blocks on every route, through the code that a launch takes as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fused_resnet.autograd import preflight
from fused_resnet.plan import planner
from fused_resnet.plan.target import H100

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Named:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(Named())
    from fused_resnet.autograd import preflight
    from fused_resnet.launch.record import rehearse_launches
    from fused_resnet.plan import planner
    from fused_resnet.plan.target import H100

    compiled = []

    def on_kernel(found):
        preflight.compile_kernel(found.kernel, found.arguments, found.options)
        compiled.append(found.kernel.fn.__name__)

    def block(dtype, residual, route, training=True):
        one, three = ((1, 1), (0, 0), (1, 1), 1), ((1, 1), (1, 1), (1, 1), 1)
        convs = ((64, 1, 1, *one), (64, 3, 3, *three), (256, 1, 1, *one))
        projection = (256, 1, 1, *one) if residual == "projection" else None
        size = (2, 64 if projection else 256, 56, 56)
        problem = planner.chain_problem(
            dtype, size, convs, projection, residual, relu=True, batch_statistics=training, backward=training
        )
        plan = planner.plan_chain(problem, H100, route)
        assert plan.route == route, (plan.route, plan.reason)
        with rehearse_launches(on_kernel), torch.no_grad():
            preflight.rehearse_chain(plan.encode(), torch.float32)

    block("bfloat16", "identity", "gram")
    block("float16", "projection", "gram")
    block("float32", "identity", "staged")
    block("bfloat16", "identity", "single", training=False)
    print(" ".join(sorted(set(compiled))))
"""


def run(script: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_every_route_compiles_through_the_call_that_a_launch_makes(tmp_path: Path) -> None:
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(done.stdout.split())
    assert {"gram_kernel", "gram_wgrad_kernel", "conv_fprop_kernel", "conv_dgrad_kernel"} <= names
    assert "bottleneck_single_kernel" in names
    assert list(tmp_path.rglob("*.cubin")), "nothing was compiled"


@pytest.mark.quick
def test_a_mistake_of_our_own_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no compiler raises must not send every block to plain PyTorch."""

    def mistaken(*_: object) -> None:
        raise TypeError("warmup() got an unexpected keyword argument")

    monkeypatch.setattr(preflight, "compile_kernel", mistaken)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    layer = (64, 1, 1, (1, 1), (0, 0), (1, 1), 1)
    flags = {"relu": True, "batch_statistics": True, "backward": True}
    problem = planner.chain_problem("float16", (2, 64, 8, 8), (layer,), None, "none", **flags)
    preflight._compile.cache_clear()
    preflight._say.cache_clear()
    with pytest.warns(UserWarning, match="could not be asked .TypeError: warmup"):
        assert preflight._compile(planner.plan_chain(problem, H100).encode(), 0, "float32") == ""
    preflight._compile.cache_clear()
