"""Peers of attention, in training and over a cache."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsfast import ops
from dsfast.bench.gpu.peers.peer import (
    GpuPeer,
    Prepared,
    RefusedError,
    compiled,
    compiled_by,
    direct,
    no_gpu,
    plain,
    reference,
    with_maximum,
)
from dsfast.bench.gpu.replaced import replaced
from dsfast.bench.peers import operators as eager
from dsfast.ops import triton


def _documents(arguments: list) -> tuple[int, list[int]]:
    """(rows of equal length, lengths); 1 row where they differ."""
    lengths = arguments[5].diff().tolist()
    return (len(lengths) if len(set(lengths)) == 1 else 1), lengths


def _heads(arguments: list, rows: int, width: int, value: int, wanted: bool) -> list[Tensor]:
    """q, k, v [rows, H, T, .], contiguous, padded with zeros to the widths; wanted: their gradients."""
    q_nope, q_rope, k_nope, k_rope, v, _, _ = arguments
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, q.size(1), -1)), -1)
    padded = (functional.pad(x, (0, to - x.size(-1))) for x, to in ((q, width), (k, width), (v, value)))
    return [x.unflatten(0, (rows, -1)).transpose(1, 2).contiguous().requires_grad_(wanted) for x in padded]


def _first_taken(attempts: Sequence[Callable[[], Prepared]], differentiable: Sequence[int]) -> Prepared:
    """The first that runs, backward too where gradients are wanted; RefusedError with every reason where none does."""
    reasons = {}
    for attempt in attempts:
        with warnings.catch_warnings(record=True) as said:  # SDPA gives its reasons as warnings
            warnings.simplefilter("always")
            try:
                prepared = attempt()
                output = prepared.run()
                if differentiable:
                    torch.autograd.grad(output, prepared.leaves, torch.ones_like(output))
                return prepared
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a backend refuses in many ways
                lines = [f"{type(error).__name__}: {error}", *(str(warning.message) for warning in said)]
                reasons |= dict.fromkeys(" ".join(line.split())[:300] for line in lines)
    raise RefusedError("; ".join(reasons))


def _widths(arguments: list) -> tuple[int, int]:
    return arguments[0].size(-1) + arguments[1].size(-1), arguments[4].size(-1)


def _prepared_heads(
    attend: Callable, arguments: list, rows: int, wanted: bool, width: int, value: int
) -> Prepared:  # fmt: skip
    leaves = _heads(arguments, rows, width, value, wanted)
    own = arguments[4].size(-1)
    return Prepared(partial(attend, *leaves), tuple(leaves), lambda o: o.transpose(1, 2).flatten(0, 1)[..., :own])


def _sdpa(backend: SDPBackend, arguments: list, differentiable: Sequence[int]) -> Prepared:
    rows, lengths = _documents(arguments)
    if len(set(lengths)) > 1:
        raise RefusedError(f"documents of unequal lengths would need a mask of {sum(lengths)} x {sum(lengths)}")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=arguments[6])

    return _values_taken(attend, arguments, rows, differentiable)


def _values_taken(attend: Callable, arguments: list, rows: int, differentiable: Sequence[int]) -> Prepared:
    """`attend` with values of their own width where it takes them, else with values as wide as the keys."""
    width, value = _widths(arguments)
    attempts = [
        partial(_prepared_heads, attend, arguments, rows, bool(differentiable), width, v)
        for v in dict.fromkeys((value, width))
    ]
    return _first_taken(attempts, differentiable)


def _compiled_attention(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """Given the operator's own arguments: the compiler is to do what a user would expand and concatenate by hand."""
    if len(set(_documents(arguments)[1])) > 1:
        raise RefusedError("documents of several lengths need a mask")
    return direct(torch.compile(eager.mla_attention), arguments, differentiable)


def _flex(arguments: list, differentiable: Sequence[int]) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, lengths = _documents(arguments)
    device, tokens = arguments[0].device, sum(lengths) // rows
    document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))

    def causal(b, h, i, j):
        return i >= j

    def within_document(b, h, i, j):
        return (i >= j) & (document[i] == document[j])

    mask = create_block_mask(causal if rows == len(lengths) else within_document, None, None, tokens, tokens, device)
    attend = partial(torch.compile(flex_attention), block_mask=mask, scale=arguments[6])
    width, value = _widths(arguments)
    power, value_power = (1 << (size - 1).bit_length() for size in (width, value))
    sizes = dict.fromkeys(((width, value), (power, value_power)))
    return _first_taken(
        [partial(_prepared_heads, attend, arguments, rows, bool(differentiable), w, v) for w, v in sizes],
        differentiable,
    )


def _no_varlen() -> str:
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    return ("" if found else "torch has it from 2.10 on") or no_gpu()


def _varlen(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """Documents side by side, as here; keys of every head in memory."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = arguments[5], max(_documents(arguments)[1])
    taken = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in taken else {"window_size": (-1, 0)}  # torch 2.10; newer
    scale = {"scale": arguments[6]} if "scale" in taken else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return varlen_attn(q, k, v, ends, ends, longest, longest, **causal, **scale).transpose(0, 1)[None]

    return _values_taken(attend, arguments, 1, differentiable)


class _ScoresAnew(torch.autograd.Function):
    """mla_attention's own kernels, those of the backward pass that keep no scores."""

    @staticmethod
    def forward(ctx, *arguments):
        from dsfast.triton_kernels import mla_attention

        *tensors, ctx.scale = arguments
        o, softmax = mla_attention.forward(*arguments)
        ctx.save_for_backward(*tensors, o, softmax)
        return o

    @staticmethod
    def backward(ctx, do):
        from dsfast.triton_kernels import mla_attention, mla_attention_kept

        *tensors, o, softmax = ctx.saved_tensors
        with replaced(mla_attention_kept, "KEPT", 0):
            return *mla_attention.backward(do, *tensors, ctx.scale, o, softmax), None, None


def _scores_anew(arguments: list, differentiable: Sequence[int]) -> Prepared:
    from dsfast.triton_kernels import attention_pieces, launch, mla_attention_kept

    large = launch.large_tiles(arguments[0].device)
    if not mla_attention_kept.heads_at_once(attention_pieces.shared_arguments(*arguments), large):
        raise RefusedError("dsfast does not keep scores here either")
    return direct(_ScoresAnew.apply, arguments, differentiable)


def _raw(arguments: list) -> bool:
    from dsfast.triton_kernels import launch, mla_attention

    v = arguments[4]
    widths = tuple(arguments[i].size(2) for i in (0, 1, 4))
    return mla_attention.without_maximum(v.dtype, widths, launch.large_tiles(v.device))


def _expanded_decode(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """Keys and values of every head in memory, as a cache without absorption has them."""
    q_nope, q_rope, latent, k_rope, _, up, scale, *pages = arguments
    latent, k_rope = (x[pages[0]].flatten(1, 2) if pages else x for x in (latent, k_rope))
    up_key, up_value = up.split((q_nope.size(2), up.size(1) - q_nope.size(2)), dim=1)
    k_nope, v = (torch.einsum("bcr,hdr->bhcd", latent, matrix).contiguous() for matrix in (up_key, up_value))
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, up.size(0), -1, -1)), -1)
    del k_nope
    q = torch.cat((q_nope, q_rope), -1)[:, :, None]
    attend = partial(functional.scaled_dot_product_attention, q, k, v, scale=scale)
    return Prepared(attend, (), lambda o: o[:, :, 0])


PEERS: dict[str, dict[str, GpuPeer]] = {
    "attention": {
        "FlexAttention": compiled_by("flex_attention", _flex),
        **{
            f"SDPA {name}": GpuPeer(f"scaled_dot_product_attention, {name} forced", partial(_sdpa, backend))
            for name, backend in {
                "flash": SDPBackend.FLASH_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION,
                "math": SDPBackend.MATH,
            }.items()
        },
        "varlen": GpuPeer("torch.nn.attention.varlen", _varlen, _no_varlen),
        "scores anew": GpuPeer("dsfast's kernels that make scores twice and keep none", _scores_anew, triton.missing),
        "with a maximum": with_maximum("mla_attention", _raw, ops.mla_attention),
        "eager": plain("the reference, scores in memory", reference("mla_attention", ops.mla_attention)),
        "compile": compiled_by("torch.compile of scaled_dot_product_attention with its expanding", _compiled_attention),
    },
    "decode": {
        "eager": plain("absorbed, einsum and softmax", eager.mla_decode),
        "compile": compiled("it", eager.mla_decode),
        "SDPA expanded": GpuPeer("scaled_dot_product_attention over keys and values of all heads", _expanded_decode),
    },
}
