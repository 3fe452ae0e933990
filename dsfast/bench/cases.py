"""What each operator is timed on: three sizes, and formulas for the work that cannot be avoided.

FLOPs count matrix products alone, two for each multiply-add; attention's are those below the diagonal. Bytes count every
input once and every result once, in float32 and int64; what an implementation keeps between forward and backward, or
computes again, is its own affair and not counted.

Sizes: "500k" and "5m" are a training step of those models at 32 x 256 tokens; "v3" has the widths of DeepSeek-V3 with as
many tokens, heads, experts and words as two cores check (in float64) and time within a minute.
Letters: N tokens, T tokens per document, B sequences, C cached tokens, or heads times width of value, D model width, R rank or
width of latent, table and head, V vocabulary, H heads, Dn / Dr / Dv widths of plain key, rotary key and value, E experts,
K chosen, G groups, S places of a page, I intermediate width, P parameters, M matrices of R rows and C columns; muon's are those
of `layers` layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsfast import ops
from dsfast.bench.peers import operators as eager
from dsfast.errors import expect_known
from dsfast.ops import cases
from dsfast.ops.muon import size_of
from dsfast.ops.newton_schulz import ITERATIONS, Shape

SIZE_NAMES = ("500k", "5m", "v3")
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "rms_norm": {"500k": {"N": 8192, "D": 128}, "5m": {"N": 8192, "D": 256}, "v3": {"N": 512, "D": 7168}},
    "rope": {
        "500k": {"N": 8192, "T": 256, "H": 4, "Dr": 16},
        "5m": {"N": 8192, "T": 256, "H": 8, "Dr": 16},
        "v3": {"N": 512, "T": 512, "H": 128, "Dr": 64},
    },
    "embedding": {  # D 0: no projection
        "500k": {"N": 8192, "V": 8000, "R": 32, "D": 128},
        "5m": {"N": 8192, "V": 8000, "R": 64, "D": 256},
        "v3": {"N": 512, "V": 2048, "R": 7168, "D": 0},
    },
    "mla_attention": {
        "500k": {"N": 8192, "T": 256, "H": 4, "Dn": 32, "Dr": 16, "Dv": 32},
        "5m": {"N": 8192, "T": 256, "H": 8, "Dn": 32, "Dr": 16, "Dv": 32},
        "v3": {"N": 1024, "T": 1024, "H": 8, "Dn": 128, "Dr": 64, "Dv": 128},
    },
    "mla_decode": {  # every cache full
        "500k": {"B": 32, "C": 256, "H": 4, "R": 32, "Dn": 32, "Dr": 16, "Dv": 32},
        "5m": {"B": 32, "C": 256, "H": 8, "R": 64, "Dn": 32, "Dr": 16, "Dv": 32},
        "v3": {"B": 4, "C": 1024, "H": 32, "R": 512, "Dn": 128, "Dr": 64, "Dv": 128},
    },
    "moe_route": {
        "500k": {"N": 8192, "E": 2, "K": 1, "G": 1, "kept": 1},
        "5m": {"N": 8192, "E": 8, "K": 2, "G": 1, "kept": 1},
        "v3": {"N": 4096, "E": 256, "K": 8, "G": 8, "kept": 4},
    },
    "moe_experts": {
        "500k": {"N": 8192, "D": 128, "E": 2, "K": 1, "I": 64},
        "5m": {"N": 8192, "D": 256, "E": 8, "K": 2, "I": 128},
        "v3": {"N": 256, "D": 7168, "E": 2, "K": 1, "I": 2048},
    },
    "swiglu_mlp": {
        "500k": {"N": 8192, "D": 128, "I": 64},
        "5m": {"N": 8192, "D": 256, "I": 128},
        "v3": {"N": 256, "D": 7168, "I": 2048},
    },
    "linear_cross_entropy": {
        "500k": {"N": 8192, "R": 32, "V": 8000},
        "5m": {"N": 8192, "R": 64, "V": 8000},
        "v3": {"N": 256, "R": 7168, "V": 4096},
    },
    "adamw": {  # P parameters in as many tensors; half of them are one table
        "500k": {"P": 520_000, "tensors": 21},
        "5m": {"P": 5_000_000, "tensors": 41},
        "v3": {"P": 22_000_000, "tensors": 3},
    },
    "muon": {  # matrices of the model's layers; of DeepSeek-V3 one expert's
        "500k": {"layers": 2, "D": 128, "I": 64},
        "5m": {"layers": 4, "D": 256, "I": 128},
        "v3": {"layers": 1, "D": 2048, "I": 512},
    },
    "newton_schulz": {  # the most costly stack; of DeepSeek-V3 eight heads' keys in kv_b_proj
        "500k": {"M": 2, "R": 128, "C": 192},
        "5m": {"M": 4, "R": 256, "C": 384},
        "v3": {"M": 8, "R": 128, "C": 512},
    },
}
UPDATES = ("adamw", "muon")
"""Operators that work in place: what is timed of them is called "update"."""
_INDEX = 8  # bytes


@dataclass(frozen=True)
class Work:
    """What a pass must do at least: FLOPs of matrix products, floats and indices (int64) read and written."""

    flops: int
    floats: int
    indices: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that are moved in float32."""
        return self.bytes_of(4)

    def bytes_of(self, itemsize: int) -> int:
        """Bytes that are moved where a floating-point number has `itemsize` bytes."""
        return itemsize * self.floats + _INDEX * self.indices

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.floats + other.floats, self.indices + other.indices)


@dataclass(frozen=True)
class BenchCase:
    """One operator at one size.

    case: its inputs, and the function that is checked on them. ours, eager: what is timed on them, in place for UPDATES.
    eager_result: eager as a function without side effects, whose results are those of `case.function`.
    backward: None for an operator without gradient.
    """

    case: cases.Case
    sizes: dict[str, int]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    eager_result: Callable[..., Any]
    forward: Work
    backward: Work | None


def operators(names: list[str]) -> list[str]:
    """`names`, or all operators if there are none. Raises UserError for an unknown one, listing the known ones."""
    expect_known("operator", names, SIZES)
    return names or list(SIZES)


def build_case(operator: str, name: str, sizes: dict[str, int] | None = None) -> BenchCase:
    """`operator` at the size called `name`; `sizes`, keyed as in SIZES, in place of that entry."""
    sizes = SIZES[operator][name] if sizes is None else sizes
    case, forward, backward = _BUILDERS[operator](name, **sizes)
    peer = getattr(eager, operator)
    if operator == "adamw":
        return BenchCase(case, sizes, _clip_and_update, peer, _eager_update, forward, backward)
    if operator == "muon":
        return BenchCase(case, sizes, ops.muon, peer, _eager_muon, forward, backward)
    return BenchCase(case, sizes, case.function, peer, peer, forward, backward)


def _rms_norm(name: str, N: int, D: int):
    # Out: y and h. Back in: dy, dh and h; the gradients of x and of the residual are one tensor.
    forward, backward = Work(0, 4 * N * D + D), Work(0, 4 * N * D + 2 * D)
    return cases.rms_norm_case(name, N, D), forward, backward


def _rope(name: str, N: int, T: int, H: int, Dr: int):
    work = Work(0, 2 * N * H * Dr + T * Dr, N)
    return cases.rope_case(name, N, H, Dr, T), work, work


def _embedding(name: str, N: int, V: int, R: int, D: int):
    width = D or R
    taken = N * R if D else 0  # rows of the table, which the projection's gradient needs
    forward = Work(2 * N * R * D, N * R + R * D + N * width, N)
    backward = Work(4 * N * R * D, N * width + taken + V * R + 2 * R * D, N)
    return cases.embedding_case(name, N, V, R, D or None), forward, backward


def _mla_attention(name: str, N: int, T: int, H: int, Dn: int, Dr: int, Dv: int):
    return attention([T] * (N // T), name, H, Dn, Dr, Dv)


def attention(lengths: Sequence[int], name: str, H: int, Dn: int, Dr: int, Dv: int) -> tuple[cases.Case, Work, Work]:
    """Case, forward and backward work of documents of `lengths` tokens."""
    N, pairs = sum(lengths), sum(T * (T + 1) // 2 for T in lengths) * H
    read, values = N * H * (2 * Dn + Dr + Dv) + N * Dr, N * H * Dv
    forward = Work(2 * pairs * (Dn + Dr + Dv), read + values)
    backward = Work(2 * forward.flops, 2 * read + values)
    return cases.mla_attention_case(name, lengths, H, Dn, Dr, Dv), forward, backward


def _mla_decode(name: str, B: int, C: int, H: int, R: int, Dn: int, Dr: int, Dv: int, S: int | None = None):
    products = H * (Dn * R + C * (R + Dr) + C * R + R * Dv)
    values = H * (Dn + Dr + Dv) + C * (R + Dr)
    forward = Work(2 * B * products, B * values + H * (Dn + Dv) * R, B if S is None else B * (1 + C // S))
    return cases.mla_decode_case(name, [C] * B, C, H, R, Dn, Dr, Dv, S), forward, None


def _moe_route(name: str, N: int, E: int, K: int, G: int, kept: int):
    forward = Work(0, N * E + E + 2 * N * K + E + 1, N * K + E)  # order and offsets are as narrow as a float
    backward = Work(0, N * K + 2 * N * E, N * K)
    return cases.moe_route_case(name, N, E, K, G, kept, norm_topk_prob=K > 1), forward, backward


def _moe_experts(name: str, N: int, D: int, E: int, K: int, I: int):
    matrices, choice = 3 * E * D * I, N * K
    forward = Work(6 * N * K * D * I, 2 * N * D + N * K + matrices, choice)
    backward = Work(2 * forward.flops, 3 * N * D + 2 * N * K + 2 * matrices, choice)
    return cases.moe_experts_case(name, N, D, K, E, I), forward, backward


def _swiglu_mlp(name: str, N: int, D: int, I: int):
    forward = Work(6 * N * D * I, 2 * N * D + 3 * D * I)
    backward = Work(2 * forward.flops, 3 * N * D + 6 * D * I)
    return cases.swiglu_mlp_case(name, N, D, I), forward, backward


def _linear_cross_entropy(name: str, N: int, R: int, V: int):
    read = N * R + V * R
    forward = Work(2 * N * R * V, read + 1, N)
    backward = Work(2 * forward.flops, 2 * read + 1, N)
    return cases.linear_cross_entropy_case(name, N, R, V, counted=1.0), forward, backward


def _newton_schulz(name: str, M: int, R: int, C: int):
    return newton_schulz([(M, R, C)], name)


def newton_schulz(shapes: Sequence[Shape], name: str) -> tuple[cases.Case, Work, None]:
    """Case and forward work of stacks of matrices: of each, as often as it iterates, X X^T, its square and a product with X."""
    flops = sum(ITERATIONS * n * (4 * rows * rows * cols + 2 * rows**3) for n, rows, cols in shapes)
    floats = 2 * sum(n * rows * cols for n, rows, cols in shapes)
    return cases.newton_schulz_case(name, *shapes), Work(flops, floats), None


def project(name: str, N: int, H: int, D: int, R: int, Dn: int, Dr: int, Dv: int) -> tuple[cases.Case, Work, Work]:
    """Case, forward and backward work of `ops.mla_project`, whose rope key has a gradient for each head."""
    weights = H * (Dn + Dr) * D + (R + Dr) * D + H * (Dn + Dv) * R
    read, written = 2 * N * D + weights + D + R, N * (H * (2 * Dn + Dr + Dv) + Dr)
    forward = Work(2 * N * weights, read + N * D + written, N)
    # In: h, its gradient and those of what was written. Out: the gradient of the stream, and of the weights.
    gradients = written + N * (H - 1) * Dr
    backward = Work(2 * forward.flops, 3 * N * D + gradients + 2 * (weights + D + R), N)
    return cases.mla_project_case(name, N, H, D, R, Dn, Dr, Dv), forward, backward


def output(name: str, N: int, D: int, C: int) -> tuple[cases.Case, Work, Work]:
    """Case, forward and backward work of `ops.mla_output`, whose y is used once; C: H Dv."""
    weights = D * C + D
    forward = Work(2 * N * D * C, N * C + 3 * N * D + weights)
    backward = Work(2 * forward.flops, 2 * N * C + 4 * N * D + 2 * weights)
    return cases.mla_output_case(name, N, D, C), forward, backward


def _muon(name: str, layers: int, D: int, I: int):
    """Projections, experts' gates and ups on top of each other, experts' downs. No clipping, as below."""
    shapes, parts = [(3 * D // 2, D), (D, D), (2, 2 * I, D), (2, D, I)] * layers, [1, 1, 2, 1] * layers
    sizes = [size_of(shape, n) for shape, n in zip(shapes, parts, strict=True)]
    flops = sum(newton_schulz([(n, min(sides), max(sides))], name)[1].flops for n, *sides in sizes)
    case = cases.muon_case(name, *shapes, parts=parts)
    # It reads weights, gradients and momenta, and writes weights and momenta.
    work = Work(flops, 5 * sum(map(math.prod, shapes)))
    return replace(case, make_inputs=lambda generator: (*case.make_inputs(generator)[:-1], 1.0)), work, None


def _eager_muon(params, grads, momenta, *settings):
    copies = [[x.clone() for x in tensors] for tensors in (params, momenta)]
    eager.muon(copies[0], grads, copies[1], *settings)
    return tuple(torch.cat([x.flatten() for x in tensors]) for tensors in copies)


def _adamw(name: str, P: int, tensors: int):
    rest = P // 2 // (tensors - 1)
    shapes = [(P - rest * (tensors - 1),), *[(rest,)] * (tensors - 1)]
    case = cases.adamw_case(name, shapes, step=1)

    def one_group(generator: torch.Generator) -> tuple:
        """One rate and decay for all, as PyTorch's has; no clipping, which would shrink the gradients call by call."""
        *tensors, lrs, decays, beta1, beta2, eps, step, _ = case.make_inputs(generator)
        return *tensors, lrs[:1] * len(lrs), decays[:1] * len(decays), beta1, beta2, eps, step, 1.0

    # The norm reads g; the update reads p, g, m, v and writes p, m, v.
    return replace(case, make_inputs=one_group), Work(0, 8 * P), None


def _clip_and_update(params, grads, *arguments) -> None:
    ops.grad_norm(grads)
    ops.adamw(params, grads, *arguments)


def _eager_update(params, grads, exp_avgs, exp_avg_sqs, *settings):
    copies = [[x.clone() for x in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
    norm = eager.adamw(*copies, *settings)
    params, _, exp_avgs, exp_avg_sqs = (torch.cat([x.flatten() for x in tensors]) for tensors in copies)
    return params, exp_avgs, exp_avg_sqs, norm


_BUILDERS = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "embedding": _embedding,
    "mla_attention": _mla_attention,
    "mla_decode": _mla_decode,
    "moe_route": _moe_route,
    "moe_experts": _moe_experts,
    "swiglu_mlp": _swiglu_mlp,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
    "muon": _muon,
    "newton_schulz": _newton_schulz,
}
