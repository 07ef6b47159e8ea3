"""Every kernel launch that ships: what the launchers pass to Triton for the layers of real networks, without a GPU.

The launchers run on ``meta`` tensors with ``launch`` intercepted, for each target's own configurations, so that what is
compiled by ``compile_audit`` is exactly what a GPU would be asked to compile.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from benchmarks.problems import Layer, layers
from fused_resnet.autograd import gram as gram_route
from fused_resnet.launch import (
    bn_act,
    bn_act_grad,
    bn_stats,
    bn_sync,
    bottleneck_single,
    cast,
    frozen_grad,
    gram,
    gram_bn_grad,
    nhwc,
    stem_conv,
    stem_pool,
)
from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.conv_dgrad import conv_dgrad
from fused_resnet.launch.conv_fprop import Projection, conv_fprop
from fused_resnet.launch.conv_pair import conv_pair
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.gram_dgrad import gram_dgrad
from fused_resnet.launch.gram_rows import gram_sums
from fused_resnet.launch.gram_wgrad import gram_wgrad
from fused_resnet.plan import planner, tables
from fused_resnet.plan.candidates import candidates
from fused_resnet.plan.config import GemmConfig, supports
from fused_resnet.plan.conv_pair import pair_candidates
from fused_resnet.plan.defaults import choices, default_config
from fused_resnet.plan.gram_wgrad import gram_wgrad_config
from fused_resnet.plan.passes import CUMULATIVE, pass_config, reduce_config, window_config
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import Target
from tests.capture import Call, Capture


def _image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((n, c, h, w), dtype=dtype, device="meta", memory_format=torch.channels_last)


def _rows(count: int, channels: int) -> torch.Tensor:
    return torch.empty((count, channels), dtype=torch.float32, device="meta")


RANKS = (8, 256)
"""Processes of a group."""


def _gathered(ranks: int, channels: int) -> torch.Tensor:
    return _rows(ranks, 2 * channels + 1)


def _parameters(channels: int) -> dict[str, Any]:
    row = _rows(1, channels)[0]
    return {"weight": row, "bias": row, "running_mean": row, "running_var": row, "eps": 1e-5}


def configurations(problem: ConvProblem, kind: str, target: Target, formed: bool = False) -> list[GemmConfig]:
    """What the cost model chooses from, whether the planner takes it or the vendor's, and what was measured here.

    ``formed``: only what was measured of a gradient whose dy was formed before.
    """
    found = [] if formed else choices(problem, kind, target)
    measured = tables.TABLES.get(tables.gpu_slug(target.name), {}).get(tables.problem_key(problem), {})
    others = ("dgrad+gram", "dgrad+in+gram", "dgrad+gram2", "wgrad+in+out+gram")  # of kernels of their own
    names = [name for name in measured if name.partition("+")[0] == kind and name not in others]
    if kind != "fprop":
        names = [name for name in names if name.endswith("+formed") == formed]
    found += [ours for name in names if (ours := measured[name].ours)]
    if problem.is_same_3x3 and not formed:  # one of each form, beside what was measured
        boxes = [config for config in candidates(problem, kind, target) if config.form != "rows"]
        found += {config.form: config for config in reversed(boxes)}.values()
    return [config for config in dict.fromkeys(found) if supports(problem, kind, target, config, formed=formed)[0]]


def _fprop(p: ConvProblem, first: bool, target: Target, dtype: torch.dtype) -> None:
    x, w = _image(p.N, p.Ci, p.H, p.W, dtype), _image(p.Co, p.Ci, p.R, p.S, dtype)
    out = _image(p.N, p.Co, p.P, p.Q, dtype)
    for config in configurations(p, "fprop", target):
        prologue = None if first or not p.is_pointwise else _rows(2, p.Ci)
        _, tiles = conv_fprop(x, w, p, config, input_affine=prologue, stats=True)
        bn_stats.bn_finalize(tiles, **_parameters(p.Co), momentum=0.1)
        conv_fprop(x, w, p, config)
        if config.form != "rows":
            continue
        for bits in (None, empty_bits(out.shape, out.device)):
            conv_fprop(x, w, p, config, output_affine=_rows(2, p.Co), relu=True, bits=bits)
            conv_fprop(x, w, p, config, output_affine=_rows(2, p.Co), residual=out, relu=True, bits=bits)


def _dgrad(p: ConvProblem, role: str, stride: tuple[int, int], target: Target, dtype: torch.dtype) -> None:
    on_load, formed = (configurations(p, "dgrad", target, formed) for formed in (False, True))
    if role == "projection":
        p = p.sampled()  # the compact gradient that the first conv's dgrad spreads
    dy, w = _image(p.N, p.Co, p.P, p.Q, dtype), _image(p.Co, p.Ci, p.R, p.S, dtype)
    x = _image(p.N, p.Ci, p.H, p.W, dtype)
    batch = {"y": dy, "coeffs": _rows(3, p.Co)} if p.is_pointwise else {}
    frozen = {"coeffs": _rows(3, p.Co)} if p.is_pointwise else {}
    wanted = [(config, (batch, frozen)) for config in on_load] + [(config, ({}, frozen)) for config in formed]
    for config, prologues in wanted:
        for prologue in prologues:
            if role == "projection":
                conv_dgrad(dy, w, p, config, **prologue)
            elif role == "conv1":
                conv_dgrad(dy, w, p, config, **prologue)
                if config.form != "rows":
                    continue
                conv_dgrad(dy, w, p, config, **prologue, residual=x)
                if p.stride == (1, 1):
                    conv_dgrad(dy, w, p, config, **prologue, residual=x, residual_bits=empty_bits(x.shape, x.device))
                compact = _image(p.N, p.Ci, -(-p.H // stride[0]), -(-p.W // stride[1]), dtype)
                conv_dgrad(dy, w, p, config, **prologue, residual=compact, residual_stride=stride)
            else:
                stats = _rows(4, p.Ci) if prologue is batch else None
                _, tiles = conv_dgrad(dy, w, p, config, **prologue, mask_input=x, mask_stats=stats)
                if stats is not None:
                    bn_act_grad.bn_grad_finalize(tiles, stats, None, p.N * p.H * p.W)
        if role not in ("projection", "conv1") and not p.is_pointwise:
            conv_dgrad(dy, w, p, config, mask_input=x)


def _wgrad(p: ConvProblem, first: bool, target: Target, dtype: torch.dtype) -> None:
    x, dy = _image(p.N, p.Ci, p.H, p.W, dtype), _image(p.N, p.Co, p.P, p.Q, dtype)
    for config in configurations(p, "wgrad", target):
        prologue = {"input_affine": None if first else _rows(2, p.Ci), "y": dy, "coeffs": _rows(3, p.Co)}
        conv_wgrad(x, dy, p, config, **(prologue if p.is_pointwise else {}), out_dtype=torch.float32)
        conv_wgrad(x, dy, p, config, out_dtype=torch.float32)
    for config in configurations(p, "wgrad", target, formed=True):
        conv_wgrad(x, dy, p, config, out_dtype=torch.float32)


def _pair(p: ConvProblem, target: Target, dtype: torch.dtype) -> None:
    """Both gradients of a chain's first 1x1 in one kernel: whatever tile is measured."""
    x, dy, w = (_image(*size, dtype) for size in ((p.N, p.Ci, p.H, p.W), (p.N, p.Co, p.P, p.Q), (p.Co, p.Ci, 1, 1)))
    compact, bits = _image(p.N, p.Ci, -(-p.H // 2), -(-p.W // 2), dtype), empty_bits(x.shape, x.device)
    for config in pair_candidates(p, target):
        for shortcut in (
            {},
            {"residual": x},
            {"residual": x, "residual_bits": bits},
            {"residual": compact, "residual_stride": (2, 2)},
        ):
            conv_pair(x, dy, dy, _rows(3, p.Co), w, p, config, **shortcut, out_dtype=torch.float32)


def _passes(p: ConvProblem, target: Target, dtype: torch.dtype) -> None:
    y, stats, coeffs = _image(p.N, p.Co, p.P, p.Q, dtype), _rows(4, p.Co), _rows(3, p.Co)
    row, counter = _rows(1, p.Co)[0], torch.empty((), dtype=torch.int64, device="meta")
    sizes = (p.M, p.Co, y.element_size(), target.sm_count)
    once, reduce, three, four = pass_config(*sizes), *(reduce_config(*sizes, tensors=n) for n in (1, 3, 4))
    parameters = _parameters(p.Co)
    tiles = bn_stats.bn_stats(y, reduce)
    for counts in (
        {"momentum": 0.1},
        {"momentum": 0.1, "counter": counter},
        {"momentum": CUMULATIVE, "counter": counter},
    ):
        bn_stats.bn_finalize(tiles, **parameters, **counts)
    norm = bn_stats.FrozenNorm(*(parameters[n] for n in ("weight", "bias", "running_mean", "running_var", "eps")))
    for count in range(1, bn_stats.MOST_NORMS + 1):
        bn_stats.bn_frozen([norm] * count, dtype=dtype)
    bn_sync.bn_sync_pack(tiles)
    for ranks in RANKS:
        for momentum in (0.1, CUMULATIVE):
            bn_sync.bn_sync_finalize(_gathered(ranks, p.Co), **parameters, momentum=momentum, counter=counter)
    for relu in (True, False):
        bn_act.bn_act(y, stats, once, relu=relu)
        bn_act.bn_act(y, stats, once, residual=y, relu=relu)
        bn_act.bn_act(y, stats, once, residual=y, residual_stats=stats, relu=relu)
    bits = empty_bits(y.shape, y.device)
    for shortcut in ({}, {"residual": y}, {"residual": y, "residual_stats": stats}):
        bn_act.bn_act(y, stats, once, bits=bits, **shortcut)
    grad = bn_act_grad.bn_act_grad_reduce
    _, tiles = grad(y, y, stats, three)
    grad(y, y, stats, three, bits=bits)
    _, sums = grad(y, y, stats, four, bits=bits, residual=y, residual_stats=stats)
    grad(y, None, None, three, bits=bits, residual=y, residual_stats=stats)
    grad(y, y, stats, reduce, relu=False)
    grad(y, None, None, reduce, bits=bits)
    grad(y, None, None, three, out=y)
    bn_act_grad.bn_grad_finalize(tiles, stats, row, p.M)
    bn_act_grad.bn_grad_finalize(sums, stats, row, p.M, row=2)
    for summed, kind in ((tiles, 1), (sums, 2)):
        packed = bn_sync.bn_sync_grad_pack(summed, p.M, row=kind)
        for ranks in RANKS:
            bn_sync.bn_sync_grad_finalize(_gathered(ranks, p.Co), packed, stats, row)
    bn_act_grad.bn_grad_apply(y, y, coeffs, once)
    bn_act_grad.bn_grad_apply(y, None, coeffs, once)
    nhwc.nhwc(torch.empty(y.shape, dtype=dtype, device="meta"))
    for expanded in ((p.N, p.Co, 1, 1), (1, 1, 1, 1)):
        nhwc.nhwc(torch.empty(expanded, dtype=dtype, device="meta").expand(y.shape))


def _gram(p: ConvProblem, target: Target, dtype: torch.dtype) -> None:
    """The Gram route of a 1x1 that widens, where the planner offers it: with a residual, raw or a projection's."""
    before = replace(p, Co=p.Ci)
    plan = planner.plan_chain(ChainProblem((before, p), residual="given"), target, "gram").gram
    if plan is None:
        return
    x, w, out = _image(p.N, p.Ci, p.P, p.Q, dtype), _image(p.Co, p.Ci, 1, 1, dtype), _image(p.N, p.Co, p.P, p.Q, dtype)
    row, counter, affine = _rows(1, p.Co)[0], torch.empty((), dtype=torch.int64, device="meta"), _rows(2, p.Ci)
    pivot, of_pivot = (_rows(2, p.Ci), affine) if plan.pivots else (None, None)
    g, c, _ = gram.gram(x, affine, plan.gram, pivot=pivot)
    gram.gram(x, affine, plan.gram, store_a=True, pivot=pivot)
    parameters = {"gamma": row, "beta": row, "running_mean": row, "running_var": row, "counter": counter, "eps": 1e-5}
    parameters |= {"pivot": pivot, "input_affine": of_pivot}
    gram.gram_finalize(g, c, p.M, w, **parameters, momentum=CUMULATIVE)
    stats, v, m = gram.gram_finalize(g, c, p.M, w, **parameters, momentum=0.1)
    gram.gram_finalize(g, c, p.M, w, **parameters, momentum=0.1, packs=True)
    bits = empty_bits(out.shape, out.device)
    for shortcut in ({}, {"residual": out}, {"residual": out, "residual_affine": stats[2:]}):
        for prologue, written in itertools.product((affine, None), (None, bits)):
            epilogue = {"output_affine": stats[2:], "relu": True, "bits": written, **shortcut}
            for config in dict.fromkeys([plan.fprop, *choices(p, "fprop", target, epilogue="residual")]):
                conv_fprop(x, w, p, config, input_affine=prologue, **epilogue)
    mean = m if plan.centres else None
    products = conv_wgrad(x, out, p, plan.wgrad, input_affine=affine, input_mean=mean, out_dtype=stats.dtype)
    for store_dz in (True, False):
        masked = plan.masked_wgrad or gram_wgrad_config(p, target)
        gram_wgrad(out, bits, x, affine, masked, store_dz=store_dz, input_mean=mean)
    kept = None if plan.centres else m
    small = gram.gram_backward(products, v, kept, stats, w, row, p.M, out_dtype=torch.float32)
    gram_sums(products, m[: p.Ci], stats, w, row, p.M, centred=plan.centres)
    others = gram_bn_grad.Others(_gathered(RANKS[0], p.Co), m)
    gram.gram_backward(products, v, kept, stats, w, row, p.M, out_dtype=torch.float32, others=others)
    below, means = _rows(4, p.Ci), (row, m) if plan.centres else None
    for mask in (None, empty_bits(out.shape, out.device)):
        matrices = small.aw, small.p, small.bias
        scaled = {"aw_terms": small.aw_terms, "scales": small.scales}
        gram_dgrad(out, x, *matrices, below, plan.dgrad, bits=mask, means=means, **scaled)


def _weights(p: ConvProblem, dtype: torch.dtype) -> None:
    """The casts of the parameters of a chain of one, two, three layers, and of three and a projection; the gradients
    of a layer whose statistics are frozen."""
    parameter = _image(p.Co, p.Ci, p.R, p.S, torch.float32)
    for count in range(1, 5) if dtype != torch.float32 else ():
        cast.cast([parameter] * count, dtype)
    read, stats, row = parameter.to(dtype), _rows(4, p.Co), _rows(1, p.Co)[0]
    for t, wants_dgamma in itertools.product((parameter, read), (True, False)):
        frozen_grad.frozen_grad(t, read, stats, row, dw_dtype=torch.float32, wants_dgamma=wants_dgamma)


def _gram_projection(p: ConvProblem, target: Target, dtype: torch.dtype) -> None:
    """The projection of a block of the Gram route, where it joins conv3 (a quarter as wide as its output)."""
    last = ConvProblem(p.N, p.P, p.Q, p.Co // 4, p.Co, dtype=p.dtype)
    chain = ChainProblem((replace(last, Co=last.Ci), last), p, "projection")
    plan = planner.plan_chain(chain, target, "gram").gram
    if plan is None or plan.projection is None:
        return
    x, w, dz = _image(p.N, p.Ci, p.H, p.W, dtype), _image(p.Co, p.Ci, 1, 1, dtype), _image(p.N, p.Co, p.P, p.Q, dtype)
    row, mean = _rows(1, p.Co)[0], _rows(1, p.Ci)[0] if plan.centres else None
    pivot = gram_route.pixels(x) if plan.pivots else None
    g, c, _ = gram.gram(x, None, plan.projection.gram, stride=p.stride, pivot=pivot)
    none = dict.fromkeys(("gamma", "beta", "running_mean", "running_var"))
    gram.gram_finalize(g, c, p.M, w, momentum=0.1, eps=1e-5, pivot=pivot, **none)
    affine, of_y, wide = _rows(2, last.Ci), _image(p.N, last.Ci, p.P, p.Q, dtype), _rows(2, p.Co)
    weight = _image(p.Co, last.Ci, 1, 1, dtype)
    joining = Projection(x, w, p, wide)
    for config in dict.fromkeys([plan.fprop, default_config(last, "fprop", target, epilogue="projection")]):
        bits = empty_bits((last.N, last.Co, last.P, last.Q), x.device)
        for prologue, written in itertools.product((affine, None), (None, bits)):
            epilogue = {"output_affine": wide, "projection": joining, "relu": True, "bits": written}
            conv_fprop(of_y, weight, last, config, input_affine=prologue, **epilogue)
    conv_wgrad(x, dz, p, plan.projection.wgrad, input_mean=mean, out_dtype=torch.float32)
    aw = torch.empty((2, p.Co, p.Ci)[dtype.itemsize > 2 :], dtype=dtype, device="meta")
    products = torch.empty((1 + (dtype.itemsize == 2), p.Ci, p.Ci), dtype=dtype, device="meta")
    aw_terms = torch.empty((1,), dtype=torch.int32, device="meta") if dtype.itemsize == 2 else None
    scales = _rows(1, 2)[0] if dtype == torch.float16 else None
    bias, means = (None, (row, mean)) if plan.centres else (_rows(1, p.Ci)[0], None)
    scaled = {"aw_terms": aw_terms, "scales": scales}
    gram_dgrad(dz, x, aw, products, bias, None, plan.projection.dgrad, stride=p.stride, means=means, **scaled)


def _single(p: ConvProblem, target: Target, dtype: torch.dtype) -> None:
    """A whole bottleneck that ends with the 1x1 ``p``, after an input of as many channels or behind a projection."""
    for ci, projects in ((p.Co, False), (p.Ci, True)):
        first = replace(p, Ci=ci, Co=p.Ci)
        convs = (first, replace(p, Co=p.Ci, R=3, S=3, padding=(1, 1)), p)
        projection = replace(p, Ci=ci) if projects else None
        problem = ChainProblem(convs, projection, "projection" if projects else "identity", True, False, False)
        config = planner.plan_chain(problem, target, "single").single
        if config is None:
            return

        def layer(conv: ConvProblem) -> bottleneck_single.FrozenLayer:
            row = _rows(1, conv.Co)[0]
            weight = _image(conv.Co, conv.Ci, conv.R, conv.S, dtype)
            return bottleneck_single.FrozenLayer(weight, row, row, row, row, 1e-5)

        x = _image(p.N, ci, p.H, p.W, dtype)
        shortcut = {"projection": layer(projection)} if projection else {"residual": x}
        layers = (layer(convs[0]), layer(convs[1]), layer(convs[2]))
        bottleneck_single.bottleneck_single(x, layers, problem, config, **shortcut)


def _stem_conv(p: ConvProblem, target: Target, dtype: torch.dtype) -> None:
    x, w, dy = (
        _image(p.N, p.Ci, p.H, p.W, dtype),
        _image(p.Co, p.Ci, p.R, p.S, dtype),
        _image(p.N, p.Co, p.P, p.Q, dtype),
    )
    for config in configurations(p, "fprop", target):
        for stats in (True, False):
            stem_conv.stem_conv_fprop(x, w, p, config, stats=stats)
    for config in configurations(p, "wgrad", target):
        stem_conv.stem_conv_wgrad(x, dy, p, config, out_dtype=torch.float32)


def _stem(p: ConvProblem, dtype: torch.dtype) -> None:
    y, stats = _image(p.N, p.Co, p.P, p.Q, dtype), _rows(4, p.Co)
    config = window_config(p.Co)
    stem_pool.stem_pool(y, stats, config, keeps_index=False)
    out, index = stem_pool.stem_pool(y, stats, config)
    stem_pool.stem_pool_grad_reduce(out, index, out, y, stats, config)
    stem_pool.stem_pool_grad_apply(out, index, out, y, _rows(3, p.Co), config)


def _layer(layer: Layer, target: Target, dtype: torch.dtype) -> None:
    p, role = layer.problem, layer.role
    first = role in ("stem", "conv1", "projection")
    stride = (2, 2) if p.H > 8 else (1, 1)
    if role == "stem":
        _stem(p, dtype)
        _stem_conv(p, target, dtype)
    else:
        _fprop(p, first, target, dtype)
        _dgrad(p, role, stride, target, dtype)
        _wgrad(p, first, target, dtype)
        if role == "conv1" and p.is_gemm:
            _pair(p, target, dtype)
        if role == "conv3":
            _gram(p, target, dtype)
            _single(p, target, dtype)
        if role == "projection":
            _gram_projection(p, target, dtype)
    _weights(p, dtype)
    _passes(p, target, dtype)


NETWORKS = (
    {"depth": 50, "batch": 256, "size": 224},
    {"depth": 18, "batch": 256, "size": 224},
    {"depth": 50, "batch": 64, "size": 32, "width": 16},  # narrow and odd: masked tiles
)


def shipped(target: Target, dtypes: tuple[str, ...], exact: bool) -> list[Call]:
    """The distinct launches on ``target``. Without ``exact``, one of each set of constants."""
    capture = Capture(target)
    with capture.intercepting():
        for network in NETWORKS:
            for name in dtypes:
                for layer in layers(**network, dtype=name):
                    capture.where = f"ResNet-{network['depth']} {layer.name} {layer.role}"
                    _layer(layer, target, getattr(torch, name))
    return list({call.key(exact): call for call in capture.calls.values()}.values())
