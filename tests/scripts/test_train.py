"""scripts/train: it learns, goes on from a checkpoint as if never stopped, and refuses in one sentence."""

from __future__ import annotations

import shlex

import pytest
import torch
import train_main

SHORT = shlex.split("--data digits --eager --device cpu --limit 128 -b 32 --lr 0.02 --print-freq 4")


def test_learns_and_evaluates(capsys):
    arguments = shlex.split("--data digits --eager --device cpu --limit 600 -b 32 --lr 0.02 --epochs 3")
    arguments += ["--opt", "sgd_nesterov"]
    assert train_main.main([*arguments, "--lr-scheduler", "cosineannealinglr", "--lr-warmup-epochs", "1"]) == 0
    printed = capsys.readouterr().out
    accuracy = float(printed.strip().splitlines()[-1].split("top-1 ")[1].split("%")[0])
    assert accuracy > 60


def test_resumed_is_as_never_stopped(tmp_path, capsys):
    def parameters(folder):
        return torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True)["model"]

    assert train_main.main([*SHORT, "--epochs", "2", "--output-dir", str(tmp_path / "whole")]) == 0
    assert train_main.main([*SHORT, "--epochs", "1", "--output-dir", str(tmp_path / "parts")]) == 0
    checkpoint = str(tmp_path / "parts" / "checkpoint.pth")
    assert (
        train_main.main([*SHORT, "--epochs", "2", "--output-dir", str(tmp_path / "parts"), "--resume", checkpoint]) == 0
    )
    whole, parts = parameters("whole"), parameters("parts")
    assert all(whole[name].equal(parts[name]) for name in whole)
    capsys.readouterr()
    assert train_main.main([*SHORT, "--resume", checkpoint, "--test-only"]) == 0
    assert "top-1" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--data nothing", "unknown data set"),
        ("--data digits --data-path /tmp", "give one of them"),
        ("--batch-size 0", "at least 1"),
        ("--batch-size 5000", "only 1438"),
        ("--device cpu --amp", "for a GPU"),
        ("--resume /nowhere/checkpoint.pth", "no such file"),
        ("--eager --route staged", "--eager"),
        ("--model cifar_resnet21", "6n + 2"),
    ],
)
def test_bad_input_is_one_sentence(arguments, says, capsys):
    assert train_main.main(["--device", "cpu", *arguments.split()]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


@pytest.mark.quick
def test_a_checkpoint_of_something_else(tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "other.pth")
    assert train_main.main([*SHORT, "--resume", str(tmp_path / "other.pth")]) == 2
    assert "not a checkpoint" in capsys.readouterr().err


@pytest.mark.quick
def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_main.main(SHORT) == 2
    assert "one GPU" in capsys.readouterr().err
