"""Chains whose first convolution has both gradients by one kernel, as where measurements found that faster."""

from __future__ import annotations

import pytest

import fused_resnet as fr
from tests.autograd.test_chain import chain
from tests.conftest import INTERPRETED
from tests.eager import compare, editing, masks_on_load, paired

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


@quick
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("route", ["staged", "gram"])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
def test_one_kernel_for_both_gradients_of_the_first_conv(kind: str, route: str, stride: int) -> None:
    """Whatever the shortcut adds; dz formed on load, too."""
    case = chain(3, kind, stride=stride)
    case.route = route
    with fr.record_launches() as usual:
        compare(case)
    with editing(lambda text: paired(masks_on_load(text))), fr.record_launches() as launches:
        compare(case)
    before, ran = ([launch.kernel for launch in each] for each in (usual, launches))
    assert "conv_pair_kernel" not in before and ran.count("conv_pair_kernel") == 1
    for kernel in ("conv_dgrad_kernel", "conv_wgrad_kernel"):
        assert ran.count(kernel) == before.count(kernel) - 1


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("wanted", ["x", "weight", "norm", "both", "all"])
def test_one_kernel_only_where_both_gradients_are_asked_for(wanted: str, training: bool) -> None:
    case = chain(3, "identity", training)
    conv, bn = case.pairs[0]
    of_x, of_weight = wanted in ("x", "both", "all"), wanted in ("weight", "both", "all")
    case.x.requires_grad_(of_x)
    conv.weight.requires_grad_(of_weight)
    bn.requires_grad_(wanted in ("norm", "all"))
    with editing(paired), fr.record_launches() as launches:
        compare(case)
    expected = training and of_x and of_weight
    assert [launch.kernel for launch in launches].count("conv_pair_kernel") == expected
