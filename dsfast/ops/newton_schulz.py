"""Muon's orthogonalisation of matrices (K. Jordan, "Muon", 2024; arXiv 2502.16982, equation 2).

Each matrix X [R, C], R <= C, by itself:

    X = X / max(|X|_F, eps)
    X = a X + (b G + c G^2) X,    G = X X^T        five times

Singular vectors stay; a singular value s becomes p(p(p(p(p(s / |X|_F))))) with p(s) = a s + b s^3 + c s^5: those from 0.002 |X|_F
on come to lie between 0.68 and 1.21, zero stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose
from dsfast.ops.library import define, expect_shape, refuse_derivative

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
EPS = 1e-7

ON_CHIP = {2: 128, 4: 32}
"""Rows of the largest matrix that the Triton kernel takes, by bytes of a number: all of X X^T lies in one program's registers,
and for float32's products both operands as well."""

Shape = tuple[int, int, int]


def newton_schulz_reference(x: Tensor, shapes: Sequence[Shape]) -> Tensor:
    parts = x.split([math.prod(shape) for shape in shapes])
    return torch.cat(
        [x[:0], *(orthogonal_reference(p.reshape(s)).flatten() for p, s in zip(parts, shapes, strict=True))]
    )


def orthogonal_reference(x: Tensor) -> Tensor:
    """x [n, R, C] -> the same shape."""
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPS).view(-1, 1, 1)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


def newton_schulz(x: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """Orthogonalise the matrices that lie one after the other in x [L]: for each (n, R, C) of `shapes` n of shape [R, C].

    Returns [L] likewise. float32, or on a GPU also float16 and bfloat16, in which Muon's authors iterate: products multiply
    numbers of x's dtype, sums are float32. A NaN stays in its matrix. Raises ValueError for R > C and where x has another
    length than the shapes together.

    One launch on a GPU; matrices of more rows than `ON_CHIP` are PyTorch's products there, and all others of that call with
    them, with a warning. It has no derivative.
    """
    if any(n < 0 or not 0 <= rows <= cols for n, rows, cols in shapes):
        raise ValueError(f"newton_schulz: shapes must be (n, R, C) with 0 <= R <= C, got {list(shapes)}")
    expect_shape("newton_schulz", "x", x, sum(math.prod(shape) for shape in shapes))
    if choose("newton_schulz", x, not_triton=too_large(x, shapes)) == "reference":
        return newton_schulz_reference(x, shapes)
    return torch.ops.dsfast.newton_schulz(x, [size for shape in shapes for size in shape])


def too_large(x: Tensor, shapes: Sequence[Shape]) -> str:
    """Why the Triton kernel does not take them, or ""."""
    rows = max([0, *(shape[1] for shape in shapes)])
    most = ON_CHIP.get(x.element_size(), rows)
    return f"the Triton kernel takes up to {most} rows of {x.dtype}, a matrix has {rows}" if rows > most else ""


def _cpu(x: Tensor, shapes: list[int]) -> Tensor:
    x, out, table = x.contiguous(), x.new_empty(x.shape), torch.tensor(shapes, dtype=torch.int64)
    native.products().newton_schulz(
        x.data_ptr(), out.data_ptr(), table.data_ptr(), len(shapes) // 3, A, B, C, EPS, ITERATIONS,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _cuda(x: Tensor, shapes: list[int]) -> Tensor:
    return triton.launcher("newton_schulz", "newton_schulz")(x, shapes, (A, B, C), EPS, ITERATIONS)


define(
    "newton_schulz(Tensor x, int[] shapes) -> Tensor",
    cpu=_cpu,
    fake=lambda x, shapes: x.new_empty(x.shape),
    cuda=_cuda,
)
refuse_derivative("newton_schulz")
