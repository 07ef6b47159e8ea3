"""A rehearsal leaves everything as it was: tensors, modes, hooks, random numbers, other threads."""

import threading

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.explain import explain
from fused_resnet.plan.target import H100, current

pytestmark = pytest.mark.quick

BATCH = (4, 16, 8, 8)


def block():
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return fr.Bottleneck(16, 8, 2, projection)


def network():
    return nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def state_of(model):
    modules = {name: (module.training, dict(vars(module))) for name, module in model.named_modules()}
    tensors = {
        name: (t, t._version, t.clone(), t.grad) for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return modules, tensors


def check(model, run):
    for t in [*model.parameters(), *model.buffers()]:
        t.data.fill_(1)
    modules, tensors = state_of(model)
    random = torch.get_rng_state()
    run(model)
    after_modules, after_tensors = state_of(model)
    assert torch.equal(random, torch.get_rng_state())
    assert modules.keys() == after_modules.keys()
    for name in modules:
        assert modules[name][0] == after_modules[name][0]
        assert modules[name][1].keys() == after_modules[name][1].keys()
        assert all(modules[name][1][key] is after_modules[name][1][key] for key in modules[name][1])
    for name, (t, version, values, grad) in tensors.items():
        after, after_version, after_values, after_grad = after_tensors[name]
        assert after is t and after_version == version and torch.equal(values, after_values)
        assert grad is None and after_grad is None


def test_fused_and_plain():
    for model in (network(), fr.reference.resnet18(), fr.Stem(3, 8)):
        shape = BATCH if isinstance(model, nn.Sequential) else (2, 3, 64, 64)
        check(model, lambda model, shape=shape: explain(model, shape, target="h100"))


def test_hooks_are_not_called():
    model, calls = network(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        module.register_forward_hook(lambda *_: calls.append(2))
    model[0].register_full_backward_hook(lambda *_: calls.append(3))
    explain(model, BATCH, target="h100")
    assert calls == []


def test_a_cumulative_average_is_left_alone():
    model = block()
    model.bn1.momentum = None
    explain(model, BATCH, target="h100")
    assert model.bn1.momentum is None and model.bn1.num_batches_tracked == 0


def test_an_error_leaves_nothing_behind():
    model = block()
    with pytest.raises(ValueError, match="input channels"):
        explain(model, (4, 3, 8, 8), target="h100")
    assert nn.modules.module._global_forward_hooks == {} == nn.modules.module._global_forward_pre_hooks
    explain(model, BATCH, target="h100")


def test_other_threads_do_not_notice():
    """Another thread that trains meanwhile keeps its own target and is not counted."""
    expected = explain(block(), BATCH, target="h100").totals()
    stop, failures, other = threading.Event(), [], nn.Conv2d(4, 4, 1)

    def busy():
        while not stop.is_set():
            other(torch.randn(1, 4, 2, 2)).sum().backward()
            if current(torch.device("cpu")) is H100:
                failures.append("the assumption leaked")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        assert explain(block(), BATCH, target="h100").totals() == expected
    finally:
        stop.set()
        thread.join()
    assert failures == []
