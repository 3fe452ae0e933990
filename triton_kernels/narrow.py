"""Tiles of a narrow model's tokens: what the kernels around its attention (`mla_project`, `mla_output`) and its head are made of.

N tokens, H heads of W numbers each; HP, WP and other letters with a P are those padded to powers of two, BN tokens make a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.launch import Launch, padded, rows
from dsfast.triton_kernels.pieces import load_tile, options, store_rows, sum_launch
from torch import Tensor

# Of an outer product: tokens of a tile, tiles of a part, warps. Not tuned on a GPU.
_TILE, _TILES, _WARPS = 64, 4, 8


@triton.jit
def _places(
    H: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, HEAD: tl.constexpr, FIRST: tl.constexpr
):
    """Numbers FIRST .. FIRST + W - 1 of H heads of HEAD numbers each: their places, and which are there, [HP WP], both
    padded."""
    c = tl.arange(0, HP * WP)
    return c // WP * HEAD + FIRST + c % WP, (c // WP < H) & (c % WP < W)


@triton.jit
def load_weight(
    p, H: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, HEAD: tl.constexpr, FIRST: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Rows FIRST .. FIRST + W - 1 of each head's HEAD in p [H HEAD, D], as [HP WP, DP], 0 where there is none."""
    row, m_row = _places(H, HP, W, WP, HEAD, FIRST)
    d = tl.arange(0, DP)[None, :]
    return tl.load(p + row[:, None] * D + d, mask=m_row[:, None] & (d < D), other=0.0)


@triton.jit
def store_weight(
    p, b_x, H: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, HEAD: tl.constexpr, FIRST: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The rows that `load_weight` reads = b_x [HP WP, DP]."""
    row, m_row = _places(H, HP, W, WP, HEAD, FIRST)
    d = tl.arange(0, DP)[None, :]
    tl.store(p + row[:, None] * D + d, b_x, mask=m_row[:, None] & (d < D))


@triton.jit
def load_tokens(
    p, start, stride, N, BN: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr
):
    """Tokens start .. start + BN - 1 of p [N, H, W], tokens `stride` apart, as [BN, HP WP], 0 where there is none."""
    n = start + tl.arange(0, BN)[:, None]
    c, m_c = _places(H, HP, W, WP, W, 0)
    return tl.load(p + (n.to(tl.int64) * stride + c[None, :]), mask=(n < N) & m_c[None, :], other=0.0)


@triton.jit
def store_tokens(
    p, b_x, start, N, BN: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr
):
    """Tokens start .. start + BN - 1 of p [N, H, W], contiguous, = b_x [BN, HP WP]."""
    n = start + tl.arange(0, BN)[:, None]
    c, m_c = _places(H, HP, W, WP, W, 0)
    tl.store(p + (n.to(tl.int64) * (H * W) + c[None, :]), b_x.to(p.dtype.element_ty), mask=(n < N) & m_c[None, :])


@triton.jit
def normalised(b_x, start, N, eps, BN: tl.constexpr, W: tl.constexpr):
    """(x / rms(x), 1 / rms(x) [BN, 1]) of b_x [BN, ...] float32, whose rows hold W numbers; zeros from token N on."""
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / W + eps)
    b_rstd = tl.where(tl.arange(0, BN) < N - start, b_rstd, 0.0)[:, None]
    return b_x * b_rstd, b_rstd


@triton.jit
def norm_backward(b_dy, b_x, b_rstd, b_weight, W: tl.constexpr):
    """The gradient of what was normalised to b_x and then multiplied by b_weight [1, ...]."""
    b_g = b_dy * b_weight
    return b_rstd * (b_g - b_x * (tl.sum(b_g * b_x, 1) / W)[:, None])


@triton.jit
def load_vector(p, W: tl.constexpr, WP: tl.constexpr):
    """p [W] as [1, WP] float32."""
    w = tl.arange(0, WP)
    return tl.load(p + w, mask=w < W, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N"])
def outer_kernel(
    a, b, parts, a_n, b_n, N,
    A: tl.constexpr, AP: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One of parts [..., A, B]: the sum over TILES tiles of tokens of a [N, A]^T b [N, B]."""
    part = tl.program_id(0)
    b_part = tl.zeros([AP, BP], tl.float32)
    for tile in range(TILES):
        start = (part * TILES + tile) * BN
        b_a = load_tile(a, a_n, start, 0, N, A, BN, AP, True)  # [BN, AP]
        b_b = load_tile(b, b_n, start, 0, N, B, BN, BP, True)  # [BN, BP]
        b_part = tl.dot(tl.trans(b_a), b_b, b_part, input_precision="ieee")
    store_rows(parts + tl.cast(part, tl.int64) * (A * B), B, 0, A, b_part, AP, B, BP)


def outer_launches(a: Tensor, b: Tensor, out: Tensor) -> list[Launch]:
    """The launches that fill out [A, B], contiguous, with a [N, A]^T b [N, B], the gradient of a weight, of which a program
    holds all: 128 x 128 numbers. In float32, always in the same order."""
    a, b = rows(a, b)
    n, (width_a, width_b) = len(a), out.shape
    parts = a.new_empty(triton.cdiv(n, _TILE * _TILES), *out.shape, dtype=torch.float32)
    arguments = {
        "a": a, "b": b, "parts": parts, "a_n": a.stride(0), "b_n": b.stride(0), "N": n, "A": width_a, "AP": padded(width_a),
        "B": width_b, "BP": padded(width_b), "BN": _TILE, "TILES": _TILES,
    }  # fmt: skip
    outer = Launch(outer_kernel, (len(parts),), arguments, options(_WARPS, 2), a.itemsize, padded(width_a))
    return [outer, sum_launch(parts, out)]
