"""Costs: the floor of launches, an optimizer's bytes, and eager PyTorch's operators, each alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.plan.cost import Cost, eager_costs, floor_seconds, optimizer_cost
from fused_resnet.plan.target import H100

pytestmark = pytest.mark.quick


class Counting(TorchDispatchMode):
    """Costs of every operator that runs inside, with its name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [(func._schema.name, cost) for cost in eager_costs(func, args, kwargs or {}, out)]
        return out


def images(*shape, dtype=torch.bfloat16, grad=True):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)


def costs_of(function, *inputs):
    """(forward, backward) costs of a function on meta tensors."""
    with Counting() as forward:
        out = function(*inputs)
    gradient = torch.empty_like(out)
    with Counting() as backward:
        torch.autograd.grad(out, [t for t in inputs if t.requires_grad], gradient)
    return [[cost for _, cost in counted.seen] for counted in (forward, backward)]


def test_each_launch_is_bound_by_its_bytes_or_its_flops():
    bound_by_bytes, bound_by_flops = Cost(flops=1, bytes=3_000_000), Cost(flops=750_000_000, bytes=1)
    assert floor_seconds([bound_by_bytes], H100) == pytest.approx(1e-6)
    assert floor_seconds([bound_by_flops], H100) == pytest.approx(1e-6)
    assert floor_seconds([bound_by_bytes, bound_by_flops], H100) == pytest.approx(2e-6)
    assert floor_seconds([], H100) == 0


@pytest.mark.parametrize(("name", "passes"), [("sgd", 5), ("adam", 7), ("adamw", 7)])
def test_an_optimizer_touches_what_requires_a_gradient(name, passes):
    frozen = torch.zeros(1000)
    trained = torch.zeros(10, 10, requires_grad=True)
    assert optimizer_cost([frozen, trained], name) == Cost(0, passes * 400, 1)
    assert optimizer_cost([frozen], name) == Cost(0, 0, 0)
    assert optimizer_cost([trained], None) == Cost(0, 0, 0)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="lion"):
        optimizer_cost([], "lion")


def test_convolution():
    x, w = images(2, 8, 6, 6), images(16, 8, 3, 3)
    (forward,), backward = costs_of(lambda x, w: torch.conv2d(x, w, padding=1), x, w)
    flops = 2 * (2 * 6 * 6) * 16 * 8 * 9
    x_bytes, w_bytes, y_bytes = (2 * t for t in (x.numel(), w.numel(), 2 * 16 * 6 * 6))
    moved = x_bytes + w_bytes + y_bytes
    assert forward == Cost(flops, moved, name="vendor_conv_fprop")
    assert backward == [Cost(flops, moved, name=f"vendor_conv_{kind}") for kind in ("dgrad", "wgrad")]


def test_a_convolution_over_few_channels_goes_by_another_name():
    x, w = images(2, 3, 6, 6, grad=False), images(16, 3, 3, 3)
    (forward,), (wgrad,) = costs_of(lambda x, w: torch.conv2d(x, w, padding=1), x, w)
    assert (forward.name, wgrad.name) == ("vendor_narrow_conv_fprop", "vendor_narrow_conv_wgrad")


def test_only_the_asked_gradient_of_a_convolution_is_counted():
    x, w = images(2, 8, 6, 6, grad=False), images(16, 8, 3, 3)
    _, backward = costs_of(lambda x, w: torch.conv2d(x, w, padding=1), x, w)
    assert len(backward) == 1 and backward[0].flops == 2 * (2 * 6 * 6) * 16 * 8 * 9


def test_a_strided_pointwise_convolution_reads_what_it_samples():
    x, w = images(2, 8, 7, 7), images(16, 8, 1, 1)
    (forward,), (dgrad, wgrad) = costs_of(lambda x, w: torch.conv2d(x, w, stride=2), x, w)
    sampled, weight, y = 2 * 2 * 8 * 16, 2 * 16 * 8, 2 * 2 * 16 * 16
    assert forward.bytes == sampled + weight + y
    assert dgrad.bytes == y + weight + 2 * x.numel()
    assert wgrad.bytes == sampled + y + weight


def test_batch_norm_reads_twice_forward_and_both_operands_twice_backward():
    x, gamma, beta = images(4, 32, 16, 16), images(32, dtype=torch.float32), images(32, dtype=torch.float32)
    mean, var = (torch.empty(32, device="meta") for _ in range(2))

    def training(x, gamma, beta):
        return torch.native_batch_norm(x, gamma, beta, mean, var, True, 0.1, 1e-5)[0]

    def frozen(x, gamma, beta):
        return torch.native_batch_norm(x, gamma, beta, mean, var, False, 0.1, 1e-5)[0]

    size, small = 2 * x.numel(), 4096
    for function, passes in ((training, (3, 5)), (frozen, (2, 3))):
        forward, backward = costs_of(function, x, gamma, beta)
        assert len(forward) == len(backward) == 1
        assert passes[0] * size <= forward[0].bytes < passes[0] * size + small
        assert passes[1] * size <= backward[0].bytes < passes[1] * size + small


def test_elementwise_operators_read_and_write_once():
    x = images(4, 32, 16, 16)
    size = 2 * x.numel()
    forward, backward = costs_of(torch.relu, x)
    assert [cost.bytes for cost in forward] == [2 * size]
    assert [cost.bytes for cost in backward] == [3 * size]
    with Counting() as counted:
        images(4, 32, 16, 16, grad=False).relu_()
    assert [cost.bytes for _, cost in counted.seen] == [2 * size]


def test_views_and_allocations_are_free_and_overwritten_inputs_are_not_read():
    x = images(4, 32, grad=False)
    with Counting() as counted:
        x.view(2, 64).t().unsqueeze(0).expand(3, 64, 2).detach()
        torch.empty_like(x)
        x.squeeze_()
    assert counted.seen == []
    with Counting() as counted:
        x.zero_()
        x.copy_(torch.empty(4, 32, device="meta"))
    assert [cost.bytes for _, cost in counted.seen] == [256, 256 + 512]


def test_an_expanded_tensor_is_read_where_it_is():
    row = images(1, 32, grad=False)
    with Counting() as counted:
        row.expand(64, 32) + images(64, 32, grad=False)
    assert counted.seen[0][1].bytes == 2 * (32 + 2 * 64 * 32)


def test_a_matrix_product_has_flops():
    with Counting() as counted:
        images(8, 16, grad=False) @ images(16, 4, grad=False)
    assert counted.seen[0][1] == Cost(2 * 8 * 16 * 4, 2 * (8 * 16 + 16 * 4 + 8 * 4), name="mm")
