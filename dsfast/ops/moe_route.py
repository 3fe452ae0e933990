"""Which experts a token goes to, and how much each counts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    score[n, e] = sigmoid(logits[n, e]), or with scoring_func "softmax", as in DeepSeek-V2, softmax(logits[n])[e]
    chosen      = the top_k experts by score + bias, from the topk_group groups whose two best such values sum highest
    weight      = score of the chosen, divided by their sum if norm_topk_prob, times scaling

N tokens, D model width, E experts, K chosen (top_k), G groups (n_group). The logits of a layer's router are x weight^T. The bias
steers the choice only: it has no gradient and is not in the weights. Equal values: the lower index wins. Experts with a bias of
-inf come last in their group: they are chosen where too few others are in the groups taken.

A slot is one (token, choice) pair, n K + k. The experts work on the slots sorted by expert, those of one expert in their order:
expert e has the slots order[offsets[e]:offsets[e + 1]].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsfast.ops import native, triton
from dsfast.ops.dispatch import choose, only_in
from dsfast.ops.library import autograd, define, expect_dtype, expect_shape, raise_out_of_range, rows
from dsfast.triton_kernels.launch import DTYPES

SCORING_FUNCS = ("sigmoid", "softmax")


class Routing(NamedTuple):
    """What `moe_route` finds."""

    weights: Tensor
    """[N, K], how much each choice counts."""
    indices: Tensor
    """[N, K] int64, the chosen experts, best first."""
    counts: Tensor
    """[E] int64, tokens per expert."""
    order: Tensor
    """[N K] int32, the slots sorted by expert."""
    offsets: Tensor
    """[E + 1] int32, where each expert's begin there."""


def moe_route_reference(logits, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func="sigmoid"):
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(1)
    with torch.no_grad():
        indices = _choose(scores + bias, top_k, n_group, topk_group)
        counts = torch.bincount(indices.flatten(), minlength=logits.size(1))
    weights = scores.gather(1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return Routing(weights * scaling, indices, counts, *sort_slots_reference(indices, logits.size(1)))


def sort_slots_reference(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    in_order, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(experts + 1, device=indices.device))
    return order.int(), offsets.int()


def route_tokens_reference(x, weight, bias, *choice):
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = torch.nn.functional.linear(x.to(wide), weight.to(wide))
    weights, *found = moe_route_reference(logits, bias.to(wide), *choice)
    return Routing(weights.to(x.dtype), *found)


def _choose(biased: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    if topk_group == n_group:
        return _top(biased, top_k)
    grouped_NGe = biased.unflatten(1, (n_group, -1))
    group_score = grouped_NGe.topk(min(2, grouped_NGe.size(2)), dim=2).values.sum(2)
    best = _top(group_score, topk_group)
    kept = torch.zeros_like(group_score, dtype=torch.int8).scatter(1, best, 1)
    order = _top(biased, biased.size(1))
    in_kept = kept.gather(1, order // grouped_NGe.size(2))
    return order.gather(1, _top(in_kept, top_k))  # experts of kept groups first, in their order


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest, largest first; a stable sort, since topk leaves the order of equal values open."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def moe_route(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool, scaling: float,
    scoring_func: str = "sigmoid",
) -> Routing:  # fmt: skip
    """logits [N, E], bias [E] -> the choice, in their dtype.

    scoring_func: one of SCORING_FUNCS. Raises ValueError for another one, other shapes or a choice that cannot be made, TypeError
    for mixed dtypes or devices.
    """
    expect_shape("moe_route", "logits", logits, "N", "E")
    expect_shape("moe_route", "bias", bias, logits.size(1))
    expect_dtype("moe_route", logits.dtype, logits.device, bias=bias)
    _check_choice(logits.size(1), top_k, n_group, topk_group, scoring_func)
    choice = top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func
    if choose("moe_route", logits) == "reference":
        return moe_route_reference(logits, bias, *choice)
    return Routing(*torch.ops.dsfast.moe_route(logits, bias, *choice))


def route_tokens(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool,
    scaling: float, scoring_func: str = "sigmoid",
) -> Routing:  # fmt: skip
    """`moe_route` of the logits x weight^T: x [N, D], weight [E, D], bias [E] float32 -> the choice, with weights in x's dtype.

    The logits are float32 whatever x is: near ties decide the choice. Where 16-bit x lies on a GPU, the gradient of the logits is
    rounded to its dtype before it is multiplied. Errors as `moe_route`.
    """
    expect_shape("moe_route", "x", x, "N", "D")
    expect_shape("moe_route", "weight", weight, "E", x.size(1))
    expect_dtype("moe_route", x.dtype, x.device, weight=weight)
    expect_shape("moe_route", "bias", bias, weight.size(0))
    expect_dtype("moe_route", torch.float32, x.device, bias=bias)
    _check_choice(weight.size(0), top_k, n_group, topk_group, scoring_func)
    choice = top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func
    implementation = choose("moe_route", bias, not_triton=only_in(DTYPES, x.dtype, "tokens in "))
    if implementation == "reference":
        return route_tokens_reference(x, weight, bias, *choice)
    if implementation == "triton":
        return Routing(*torch.ops.dsfast.moe_route_tokens(x, weight, bias, *choice)[:5])
    weights, *found = moe_route(torch.nn.functional.linear(x.float(), weight.float()), bias, *choice)
    return Routing(weights.to(x.dtype), *found)


def sort_slots(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """indices [N, K] int64 -> order [N K] and offsets [E + 1] int32, as `Routing` has them.

    Raises ValueError on a CPU for an index outside 0..E-1; a GPU is not waited for: there such slots come last.
    """
    return torch.ops.dsfast.sort_slots(indices, experts)


def _check_choice(experts: int, top_k: int, n_group: int, topk_group: int, scoring_func: str) -> None:
    if scoring_func not in SCORING_FUNCS:
        raise ValueError(f"moe_route: scoring_func must be one of {', '.join(SCORING_FUNCS)}, got {scoring_func!r}")
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"moe_route: cannot take {topk_group} of {n_group} equal groups of {experts} experts")
    if not 1 <= top_k <= experts // n_group * topk_group:
        raise ValueError(f"moe_route: top_k must be 1..{experts // n_group * topk_group}, got {top_k}")


def _forward_cpu(logits, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func):
    logits, bias = logits.contiguous(), bias.contiguous()
    outputs = _forward_fake(logits, bias, top_k)
    native.module().moe_route_forward(
        logits.data_ptr(), bias.data_ptr(), *(x.data_ptr() for x in outputs), *logits.shape, top_k, n_group, topk_group,
        norm_topk_prob, scoring_func == "softmax", scaling, torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _forward_fake(logits, bias, top_k, *_):
    n, e = logits.shape
    indices = logits.new_empty(n, top_k, dtype=torch.int64)
    counts = logits.new_empty(e, dtype=torch.int64)
    return logits.new_empty(n, top_k), indices, counts, *_sort_fake(indices, e)


def _sort_cpu(indices, experts):
    indices = indices.contiguous()
    order, offsets = _sort_fake(indices, experts)
    bad = native.module().sort_slots(indices.data_ptr(), indices.numel(), experts, order.data_ptr(), offsets.data_ptr())
    raise_out_of_range("moe_experts", "indices", bad, indices.numel(), experts)
    return order, offsets


def _sort_fake(indices, experts):
    return indices.new_empty(indices.numel(), dtype=torch.int32), indices.new_empty(experts + 1, dtype=torch.int32)


def _backward_cpu(dweights, logits, indices, norm_topk_prob, scaling, scoring_func):
    dweights, logits = rows(dweights), logits.contiguous()
    dlogits = logits.new_empty(logits.shape)
    native.module().moe_route_backward(
        dweights.data_ptr(), dweights.stride(0), logits.data_ptr(), indices.data_ptr(),
        dlogits.data_ptr(), *logits.shape, indices.size(1), norm_topk_prob, scoring_func == "softmax", scaling,
        torch.get_num_threads(),
    )  # fmt: skip
    return dlogits


def _tokens_fake(x, weight, bias, *choice):
    logits = x.new_empty(x.size(0), weight.size(0), dtype=torch.float32)
    weights, *found = _forward_fake(logits, bias, *choice)
    return weights.to(x.dtype), *found, logits


def _setup_context(ctx, inputs, output):
    logits, _, _, _, _, *ctx.weighing = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dweights, *_):
    if dweights is None:
        return (None,) * 8
    return torch.ops.dsfast.moe_route_backward(dweights, *ctx.saved_tensors, *ctx.weighing), *(None,) * 7


def _tokens_setup_context(ctx, inputs, output):
    x, weight, _, _, *ctx.choice = inputs
    _, indices, *_, logits = output
    ctx.save_for_backward(x, weight, logits, indices)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _tokens_backward(ctx, dweights, *_):
    if dweights is None:
        return (None,) * 9
    n_group, _, *weighing = ctx.choice
    gradients = torch.ops.dsfast.moe_route_tokens_backward(dweights, *ctx.saved_tensors, n_group, *weighing)
    return *gradients, *(None,) * 7


define(
    "sort_slots(Tensor indices, int experts) -> (Tensor, Tensor)",
    cpu=_sort_cpu,
    fake=_sort_fake,
    cuda=triton.launcher("moe_route", "sort_slots"),
)

_WEIGHING = "bool norm_topk_prob, float scaling, str scoring_func"
_ROUTING = "Tensor weights, Tensor indices, Tensor counts, Tensor order, Tensor offsets"
define(
    f"moe_route(Tensor logits, Tensor bias, int top_k, int n_group, int topk_group, {_WEIGHING}) -> ({_ROUTING})",
    cpu=_forward_cpu,
    fake=_forward_fake,
    cuda=triton.launcher("moe_route", "forward"),
)
define(
    f"moe_route_backward(Tensor dweights, Tensor logits, Tensor indices, {_WEIGHING}) -> Tensor",
    cpu=_backward_cpu,
    fake=lambda dweights, logits, *_: logits.new_empty(logits.shape),
    cuda=triton.launcher("moe_route", "backward"),
)
autograd("moe_route", _backward, _setup_context)

define(
    f"moe_route_tokens(Tensor x, Tensor weight, Tensor bias, int top_k, int n_group, int topk_group, {_WEIGHING})"
    f" -> ({_ROUTING}, Tensor logits)",
    cpu=None,
    fake=_tokens_fake,
    cuda=triton.launcher("moe_route", "forward_tokens"),
)
define(
    "moe_route_tokens_backward(Tensor dweights, Tensor x, Tensor weight, Tensor logits, Tensor indices, int n_group,"
    f" {_WEIGHING}) -> (Tensor, Tensor)",
    cpu=None,
    fake=lambda dweights, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    cuda=triton.launcher("moe_route", "backward_tokens"),
)
autograd("moe_route_tokens", _tokens_backward, _tokens_setup_context)
