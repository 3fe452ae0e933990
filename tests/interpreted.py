"""Triton's interpreter as the tests need it: exact products, integers that are seen to overflow, and twice as fast."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def set_up_interpreter() -> None:
    """For the rest of the process."""
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.TritonSemantic = _Semantic  # of which triton 3.6 makes one for each function
    interpreter.interpreter_semantic = _Semantic(interpreter.interpreter_builder)
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._patch_lang = _patch_once


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A product summed exactly, then rounded.

    The interpreter leaves it to numpy, whose order of summation depends on the processor's BLAS kernel, and on which
    operand is transposed: scores made again in the backward pass then differ from those of the forward pass by
    rounding, which a matrix instruction's do not, and no error could be told from it.
    """
    product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
    return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)


class _Semantic(interpreter.TritonSemantic):
    """The interpreter's, Triton's own that compiles being left as it is."""

    def binary_op_sanitize_overflow_impl(self, lhs, rhs, binary_op) -> None:
        """Computed by a dozen operations of its own, nearly half of all time, and then not looked at."""
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        exact = EXACT[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if exact.size and not (kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()):
            raise OverflowError(f"{kind} overflows in {binary_op.__name__}")


def _patch_tensor(tensor, scope, patch=interpreter._patch_lang_tensor) -> None:
    """A bound of `range` known at run time is an array of one element, which triton 3.6 cannot convert with numpy 2.4."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patch_once(fn, patch=interpreter._patch_lang):
    """Once for a launch. For each function that a kernel calls again it would change nothing, and took a third of all time."""
    seen = [module for module in (tl, tl.core) if any(x is module for x in fn.__globals__.values())]
    unpatched = any(tl.core.is_builtin(module.load) for module in seen)
    return patch(fn) if unpatched else interpreter._LangPatchScope()
