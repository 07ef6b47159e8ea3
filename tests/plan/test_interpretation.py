"""Whether kernels are interpreted is settled when Triton is imported: each case in a process of its own."""

import os
import subprocess
import sys

import pytest


def python(code, **environment):
    """Runs ``code`` in a fresh interpreter; TRITON_INTERPRET is unset unless given."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**variables, **environment}, capture_output=True, text=True, timeout=300
    )


PROLOGUE = "import os, torch; from fused_resnet.plan import target; cpu = torch.device('cpu'); "


def test_a_cpu_without_the_interpreter_has_no_target():
    done = python(PROLOGUE + "print(target.current(cpu), '|', target.why_not(cpu))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None | the kernels need a GPU")


def test_asking_for_a_target_does_not_start_cuda():
    done = python(PROLOGUE + "target.current(cpu); print(torch.cuda.is_initialized())")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "code",
    [
        PROLOGUE + "os.environ['TRITON_INTERPRET'] = '1'; target.current(cpu)",
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; " + PROLOGUE + "target.current(cpu)",
    ],
    ids=["after the package", "between triton and the package"],
)
def test_interpretation_set_too_late_is_one_clear_error(code):
    done = python(code)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 was set after Triton had been imported" in done.stderr
    assert "before Python starts" in done.stderr
