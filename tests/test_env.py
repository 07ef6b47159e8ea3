"""``python -m fused_resnet env``: what a bug report needs."""

import os
import subprocess
import sys

import pytest
import torch
import triton

import fused_resnet
from fused_resnet.__main__ import environment, main


def values(text):
    return dict(line.split(":", 1) for line in text.splitlines())


def test_it_names_versions_routes_and_caches():
    found = {name.strip(): value.strip() for name, value in values(environment()).items()}
    assert found["fused_resnet"] == fused_resnet.__version__
    assert found["torch"].startswith(torch.__version__)
    assert found["triton"] == triton.__version__
    assert "reference" in found["routes on cpu"]
    assert found["triton cache"] and found["inductor cache"]


def test_variables_are_shown_by_name_and_others_are_not(monkeypatch):
    monkeypatch.setenv("TRITON_PRINT_AUTOTUNING", "0")
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    text = environment()
    assert "TRITON_PRINT_AUTOTUNING=0" in text and "secret" not in text


def run(*arguments, **changes):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fused_resnet", *arguments],
        env={**variables, **changes},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_as_a_command():
    done = run("env")
    assert done.returncode == 0, done.stderr
    names, values = zip(*(line.split(":", 1) for line in done.stdout.splitlines()), strict=True)
    assert dict(zip(names, values, strict=True))["fused_resnet"].strip() == fused_resnet.__version__
    assert all(value.startswith(" ") for value in values)
    if not torch.cuda.is_available():
        assert "reference (the kernels need a GPU" in done.stdout


def test_as_a_command_in_the_interpreter():
    done = run("env", TRITON_INTERPRET="1")
    assert "in Triton's interpreter" in done.stdout, done.stderr


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["environment"])
    assert error.value.code == 2 and "env" in capsys.readouterr().err
