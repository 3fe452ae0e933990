"""Random inputs of any size for every operator: what the live check, the tests and the bench run the operators on.

Each function returns a Case whose `make_inputs` draws float32 arguments from a generator. Shape letters as in the
operator's own module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dsfast.ops.adamw import adamw, grad_norm
from dsfast.ops.embedding import embedding, tied_embedding
from dsfast.ops.linear_cross_entropy import linear_cross_entropy
from dsfast.ops.mla_attention import mla_attention
from dsfast.ops.mla_decode import mla_decode
from dsfast.ops.mla_output import mla_output
from dsfast.ops.mla_project import mla_project
from dsfast.ops.moe_experts import moe_experts
from dsfast.ops.moe_route import moe_route, route_tokens
from dsfast.ops.muon import muon
from dsfast.ops.newton_schulz import Shape, newton_schulz
from dsfast.ops.rms_norm import rms_norm, stream_norm
from dsfast.ops.rope import rope, split_and_turn
from dsfast.ops.swiglu_mlp import swiglu_mlp


@dataclass(frozen=True)
class Case:
    """`function(*make_inputs(generator))`, with gradients wanted for the arguments at positions `differentiable`."""

    operator: str
    name: str
    function: Callable[..., Any]
    make_inputs: Callable[[Generator], tuple]
    differentiable: tuple[int, ...] = ()


def rms_norm_case(name: str, n: int, d: int, residual: bool = True) -> Case:
    def make_inputs(g: Generator) -> tuple:
        x, weight = _normal(g, n, d), 1 + 0.2 * _normal(g, d)
        return (x, weight, 1e-6, _normal(g, n, d)) if residual else (x, weight, 1e-6)

    return Case("rms_norm", name, rms_norm, make_inputs, (0, 1, 3) if residual else (0, 1))


def stream_norm_case(name: str, n: int, d: int, uses: int) -> Case:
    def make_inputs(g: Generator) -> tuple:
        return _normal(g, n, d), 1 + 0.2 * _normal(g, d), 1e-6, _normal(g, n, d), uses

    return Case("rms_norm", name, stream_norm, make_inputs, (0, 1, 3))


def rope_case(name: str, n: int, h: int, dr: int, p: int) -> Case:
    def make_inputs(g: Generator) -> tuple:
        angles = torch.arange(p)[:, None] * 10000.0 ** (-torch.arange(dr // 2) / max(dr // 2, 1))
        return _normal(g, n, h, dr), angles.cos(), angles.sin(), torch.randint(p, (n,), generator=g)

    return Case("rope", name, rope, make_inputs, (0,))


def split_and_turn_case(name: str, n: int, h: int, dn: int, r: int, dr: int, p: int) -> Case:
    def make_inputs(g: Generator) -> tuple:
        _, *tables = rope_case(name, n, h, dr, p).make_inputs(g)
        return _normal(g, n, h, dn + dr), _normal(g, n, r + dr), *tables

    return Case("rope", name, split_and_turn, make_inputs, (0, 1))


def embedding_case(name: str, n: int, v: int, r: int, d: int | None) -> Case:
    """Without `d` there is no projection. A quarter of the tokens are one word, as in text."""

    def make_inputs(g: Generator) -> tuple:
        input_ids = torch.randint(v, (n,), generator=g)
        input_ids[::4] = v // 2
        projection = None if d is None else _normal(g, r, d, scale=r**-0.5)
        return input_ids, _normal(g, v, r), projection

    return Case("embedding", name, embedding, make_inputs, (1,) if d is None else (1, 2))


def tied_embedding_case(name: str, n: int, v: int, r: int, d: int) -> Case:
    """Table and projection go on to a head, whose gradients come back for them."""
    return replace(embedding_case(name, n, v, r, d), function=tied_embedding)


def mla_attention_case(
    name: str, lengths: Sequence[int], h: int, dn: int, dr: int, dv: int, hk: int | None = None,
    function: Callable[..., Any] = mla_attention,
) -> Case:  # fmt: skip
    """Documents of `lengths` tokens. hk: heads of keys and values, None: h."""
    hk = h if hk is None else hk

    def make_inputs(g: Generator) -> tuple:
        n = sum(lengths)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        queries_and_keys = (_normal(g, *shape) for shape in ((n, h, dn), (n, h, dr), (n, hk, dn), (n, dr)))
        return *queries_and_keys, _normal(g, n, hk, dv), cu_seqlens, (dn + dr) ** -0.5

    return Case("mla_attention", name, function, make_inputs, (0, 1, 2, 3, 4))


def mla_decode_case(
    name: str, lengths: Sequence[int], c: int, h: int, r: int, dn: int, dr: int, dv: int, page: int | None = None
) -> Case:
    """Sequences of `lengths` tokens in a cache of c places; with `page`, in pages of that many places, shuffled."""

    def make_inputs(g: Generator) -> tuple:
        b = len(lengths)
        cache = (b, c) if page is None else (b * (c // page), page)
        queries_and_cache = (_normal(g, *shape) for shape in ((b, h, dn), (b, h, dr), (*cache, r), (*cache, dr)))
        held = torch.tensor(lengths, dtype=torch.int64)
        arguments = *queries_and_cache, held, _weight(g, h, dn + dv, r), (dn + dr) ** -0.5
        return arguments if page is None else (*arguments, torch.randperm(cache[0], generator=g).view(b, c // page))

    return Case("mla_decode", name, mla_decode, make_inputs)


def moe_route_case(
    name: str, n: int, e: int, k: int, n_group: int = 1, topk_group: int = 1, norm_topk_prob: bool = False, *scoring_func: str
) -> Case:  # fmt: skip
    def make_inputs(g: Generator) -> tuple:
        return _normal(g, n, e), _normal(g, e, scale=0.1), k, n_group, topk_group, norm_topk_prob, 2.5, *scoring_func

    return Case("moe_route", name, moe_route, make_inputs, (0,))


def route_tokens_case(
    name: str, n: int, d: int, e: int, k: int, n_group: int = 1, topk_group: int = 1, norm_topk_prob: bool = False,
    *scoring_func: str,
) -> Case:  # fmt: skip
    def make_inputs(g: Generator) -> tuple:
        x, weight, bias = _normal(g, n, d), _weight(g, e, d), _normal(g, e, scale=0.1)
        return x, weight, bias, k, n_group, topk_group, norm_topk_prob, 2.5, *scoring_func

    return Case("moe_route", name, routed_tokens, make_inputs, (0, 1))


def routed_tokens(
    x, weight, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, *scoring_func
) -> tuple[Tensor, Tensor, Tensor]:
    """`route_tokens` with the bias in float32 whatever the others are cast to."""
    return route_tokens(x, weight, bias.float(), top_k, n_group, topk_group, norm_topk_prob, scaling, *scoring_func)


def moe_experts_case(name: str, n: int, d: int, k: int, e: int, i: int, used: Sequence[int] | None = None) -> Case:
    """Each token goes to k different experts of `used` (all e of them if None); the others get no token."""

    def make_inputs(g: Generator) -> tuple:
        among = torch.tensor(range(e) if used is None else used, dtype=torch.int64)
        indices = among[torch.rand(n, len(among), generator=g).argsort(1)[:, :k]]
        weights = torch.rand(n, k, generator=g) + 0.1
        gate_up, down = _weight(g, e, 2 * i, d), _weight(g, e, d, i)
        return _normal(g, n, d), weights, indices, gate_up, down

    return Case("moe_experts", name, moe_experts, make_inputs, (0, 1, 3, 4))


def swiglu_mlp_case(name: str, n: int, d: int, i: int) -> Case:
    def make_inputs(g: Generator) -> tuple:
        return _normal(g, n, d), _weight(g, 2 * i, d), _weight(g, d, i)

    return Case("swiglu_mlp", name, swiglu_mlp, make_inputs, (0, 1, 2))


def linear_cross_entropy_case(name: str, n: int, r: int, v: int, counted: float = 0.9, d: int | None = None) -> Case:
    """About `counted` of the labels count, the others are the ignore_index. d: width before a projection; None: there is none."""

    def make_inputs(g: Generator) -> tuple:
        labels = torch.randint(v, (n,), generator=g)
        labels[torch.rand(n, generator=g) >= counted] = -100
        inputs = _normal(g, n, d or r), _normal(g, v, r, scale=2 * r**-0.5), labels
        return inputs if d is None else (*inputs, -100, 0.0, _weight(g, r, d))

    return Case("linear_cross_entropy", name, linear_cross_entropy, make_inputs, (0, 1) if d is None else (0, 1, 5))


def newton_schulz_case(name: str, *shapes: Shape) -> Case:
    """Singular values from a tenth of the largest possible on: where there is next to none, rounding is enlarged 485 times
    (3.4445^5), by every implementation, and the errors of two of them are as far apart as chance has it.
    """

    def make_inputs(g: Generator) -> tuple:
        return torch.cat([_normal(g, 0), *(_matrices(g, *shape).flatten() for shape in shapes)]), shapes

    return Case("newton_schulz", name, newton_schulz, make_inputs)


def _matrices(g: Generator, n: int, rows: int, cols: int) -> Tensor:
    """[n, rows, cols], singular values between 0.1 and 1."""
    short = min(rows, cols)
    u, v = (torch.linalg.qr(_normal(g, n, size, short))[0] for size in (rows, cols))
    return (u * 0.1 ** torch.rand(n, 1, short, generator=g)) @ v.mT


def muon_case(
    name: str, *shapes: tuple[int, ...], parts: Sequence[int] | None = None, missing: int | None = None
) -> Case:
    """Parameters of `shapes` no larger than their update, in which an error would else be a rounding; the gradient of number
    `missing` None. The momenta have no small singular values, as above, and the gradients are too small to make one."""
    parts = list(parts or [1] * len(shapes))

    def drawn(g: Generator, shape: tuple[int, ...], n: int) -> Tensor:
        return _matrices(g, math.prod(shape[:-2]) * n, shape[-2] // n, shape[-1]).reshape(shape)

    def make_inputs(g: Generator) -> tuple:
        params = [0.01 * _normal(g, *shape) for shape in shapes]
        momenta, grads = ([drawn(g, *pair) * size for pair in zip(shapes, parts, strict=True)] for size in (1.0, 0.1))
        if missing is not None:
            grads[missing] = None
        return params, grads, momenta, parts, 0.02, 0.1, 0.95, 0.7

    return Case("muon", name, updated_by_muon, make_inputs)


def updated_by_muon(
    params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale=1.0, lr_scale=1.0, dtype=None
) -> tuple[Tensor, ...]:
    """`muon` without side effects: all params and all momenta as one vector each. dtype: in which it iterates; None: on a GPU in
    bfloat16, as a model's training does there, but where all is in float64."""
    params, momenta = ([x.clone() for x in tensors] for tensors in (params, momenta))
    if dtype is None and params[0].is_cuda and params[0].dtype == torch.float32:
        dtype = torch.bfloat16
    muon(params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale, lr_scale, dtype)
    return tuple(torch.cat([x.flatten() for x in tensors]) for tensors in (params, momenta))


def adamw_case(name: str, shapes: Sequence[tuple[int, ...]], step: int) -> Case:
    def make_inputs(g: Generator) -> tuple:
        params, grads, exp_avgs = ([_normal(g, *shape) for shape in shapes] for _ in range(3))
        exp_avg_sqs = [_normal(g, *shape).square() for shape in shapes]
        lrs, decays = ([base * (1 + t) for t in range(len(shapes))] for base in (1e-2, 1e-1))
        return params, grads, exp_avgs, exp_avg_sqs, lrs, decays, 0.9, 0.95, 1e-8, step, 0.7

    return Case("adamw", name, updated_by_adamw, make_inputs)


def updated_by_adamw(params, grads, exp_avgs, exp_avg_sqs, *settings) -> tuple[Tensor, ...]:
    """`adamw` and `grad_norm` without side effects: all params, exp_avgs, exp_avg_sqs as one vector each, and the norm."""
    params, exp_avgs, exp_avg_sqs = ([x.clone() for x in tensors] for tensors in (params, exp_avgs, exp_avg_sqs))
    adamw(params, grads, exp_avgs, exp_avg_sqs, *settings)
    flat = (torch.cat([x.flatten() for x in tensors]) for tensors in (params, exp_avgs, exp_avg_sqs))
    return *flat, torch.tensor(grad_norm(grads), dtype=torch.float64)


def mla_project_case(
    name: str, n: int, h: int, d: int, r: int, dn: int, dr: int, dv: int, residual: bool = True,
    function: Callable[..., Any] = mla_project,
) -> Case:  # fmt: skip
    """What stands for several operators goes where attention goes."""
    places = 11

    def make_inputs(g: Generator) -> tuple:
        angles = torch.arange(places)[:, None] * 100.0 ** (-torch.arange(dr // 2) / (dr // 2))
        delta, before = _normal(g, n, d), _normal(g, n, d) if residual else None
        norm, latent_norm = 1 + 0.2 * _normal(g, d), 1 + 0.2 * _normal(g, r)
        q, kv_a = _weight(g, h * (dn + dr), d), _weight(g, r + dr, d)
        kv_b, positions = _weight(g, h * (dn + dv), r), torch.randint(places, (n,), generator=g)
        return delta, before, norm, 1e-6, q, kv_a, latent_norm, 1e-5, kv_b, h, angles.cos(), angles.sin(), positions

    return Case("mla_attention", name, function, make_inputs, (0, *([1] if residual else []), 2, 4, 5, 6, 8))


def mla_output_case(
    name: str, n: int, d: int, c: int, uses: int = 1, function: Callable[..., Any] = mla_output
) -> Case:
    def make_inputs(g: Generator) -> tuple:
        return _normal(g, n, c), _weight(g, d, c), _normal(g, n, d), 1 + 0.2 * _normal(g, d), 1e-6, uses

    return Case("mla_attention", name, function, make_inputs, (0, 1, 2, 3))


def _weight(generator: Generator, *shape: int) -> Tensor:
    """Numbers to multiply by in a product, [..., inputs]."""
    return _normal(generator, *shape, scale=max(1, shape[-1]) ** -0.5)


def _normal(generator: Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * scale
