"""Each operator as a good PyTorch user writes it: what "eager" means in every table of the bench.

Names, arguments and results are those of dsfast.ops, which says the shapes (adamw also does the clipping). dsfast's
references are written to be read beside the paper, these to be fast in PyTorch. Documents must be equally long here, and
caches full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dsfast.ops.muon import RMS, size_of
from dsfast.ops.newton_schulz import EPS, ITERATIONS, A, B, C, Shape


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    h = x if residual is None else x + residual
    y = functional.rms_norm(h, weight.shape, weight, eps)
    return y if residual is None else (y, h)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, cos[positions, None], sin[positions, None])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., Dr] with cos and sin that broadcast to [..., Dr / 2]: the interleaved pairs of x turned."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def embedding(input_ids: Tensor, table: Tensor, projection: Tensor | None = None) -> Tensor:
    taken = functional.embedding(input_ids, table)
    return taken if projection is None else taken @ projection


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q and k [B, H, T, Dk], v [B, H, T, Dv] -> [B, H, T, Dv]."""
    # Padded, narrower v are as wide as the keys, which SDPA's fused CPU kernel asks for; unpadded it takes the slow path.
    padded = functional.pad(v, (0, max(q.size(-1) - v.size(-1), 0)))
    return functional.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=scale)[..., : v.size(-1)]


def mla_attention(q_nope, q_rope, k_nope, k_rope, v, cu_seqlens, scale):
    documents, heads = len(cu_seqlens) - 1, q_nope.size(1)
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, heads, -1)), -1)
    q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
    return causal_attention(q, k, v, scale).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def mla_decode(q_nope, q_rope, latent, k_rope, lengths, up, scale, pages=None):
    """Keys and values absorbed, the heads as queries of one shared key [latent; k_rope]; a paged cache is gathered first."""
    if pages is not None:
        latent, k_rope = (x[pages].flatten(1, 2) for x in (latent, k_rope))
    up_key, up_value = up.split((q_nope.size(2), up.size(1) - q_nope.size(2)), dim=1)
    q = torch.cat((torch.einsum("bhn,hnr->bhr", q_nope, up_key), q_rope), -1)
    s = torch.baddbmm(q.new_empty(()), q, torch.cat((latent, k_rope), -1).mT, beta=0, alpha=scale)
    return torch.einsum("bhr,hvr->bhv", s.softmax(-1) @ latent, up_value)


def mla_project(
    delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
) -> tuple[Tensor, ...]:  # fmt: skip
    rank, turned = latent_norm.size(0), 2 * cos.size(1)
    plain = q.size(0) // heads - turned
    x, h = rms_norm(delta, norm, eps, residual)
    q_nope, q_rope = functional.linear(x, q).unflatten(-1, (heads, -1)).split((plain, turned), -1)
    latent, k_rope = functional.linear(x, kv_a).split((rank, turned), -1)
    keys = functional.linear(rms_norm(latent, latent_norm, latent_eps), kv_b).unflatten(-1, (heads, -1))
    k_nope, v = keys.split((plain, keys.size(-1) - plain), -1)
    cos, sin = cos[positions], sin[positions]
    k_rope = rotate(k_rope, cos, sin)[:, None].expand(q_rope.shape)
    return h, q_nope, rotate(q_rope, cos[:, None], sin[:, None]), k_nope, k_rope, v


def mla_output(values, o, residual, norm, eps, uses):
    y, h = rms_norm(functional.linear(values, o), norm, eps, residual)
    return *[y] * uses, h


def moe_route(logits, *choice):
    weights, indices, counts = choose_experts(logits, *choice)
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    return weights, indices, counts, indices.flatten().argsort(stable=True).int(), offsets.int()


def choose_experts(logits, bias, top_k, n_group, topk_group, norm_topk_prob, scaling, scoring_func="sigmoid"):
    """The first three results of `moe_route`: a model that loops over its experts sorts nothing."""
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(1)
    biased = (scores + bias).detach()
    if n_group > 1:
        grouped = biased.unflatten(1, (n_group, -1))
        best = grouped.topk(min(2, grouped.size(2)), dim=2).values.sum(2).topk(topk_group, dim=1).indices
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        biased = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    indices = biased.topk(top_k, dim=1).indices
    weights = scores.gather(1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * scaling, indices, counted(indices, logits.size(1))


def counted(indices: Tensor, experts: int) -> Tensor:
    """How often each expert stands in `indices` [experts]. A GPU's host waits for bincount, but not for this."""
    chosen = indices.flatten()
    if not chosen.is_cuda:
        return torch.bincount(chosen, minlength=experts)
    return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def moe_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(gate_up.size(0)):
        token, choice = (indices == e).nonzero(as_tuple=True)
        out = swiglu_mlp(x.index_select(0, token), gate_up[e], down[e])
        y = y.index_add(0, token, out * weights[token, choice, None])
    return y


def swiglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = functional.linear(x, gate_up).chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, down)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight), labels, ignore_index=ignore_index)


def newton_schulz(x: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """Batched products of each stack; the additions are in the products."""
    results = []
    for part, shape in zip(x.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
        y = part.view(shape)
        y = y / y.flatten(1).norm(dim=1).clamp(min=EPS).view(-1, 1, 1)
        for _ in range(ITERATIONS):
            gram = torch.bmm(y, y.mT)
            polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
            y = torch.baddbmm(y, polynomial, y, beta=A)
        results.append(y.flatten())
    return torch.cat(results)


@torch.no_grad()
def muon(
    params, grads, momenta, parts, lr, weight_decay, momentum, clip_scale=1.0, dtype: torch.dtype | None = None
) -> None:  # fmt: skip
    """foreach for what goes element by element, equal matrices orthogonalised together; changes the gradients too."""
    torch._foreach_mul_(grads, clip_scale)
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    sizes = [size_of(p.shape, n) for p, n in zip(params, parts, strict=True)]
    ahead = torch._foreach_lerp(grads, momenta, momentum)
    updates = [u.view(size).to(dtype or u.dtype) for u, size in zip(ahead, sizes, strict=True)]
    short = [u.mT if u.size(1) > u.size(2) else u for u in updates]
    shapes = {u.shape[1:]: [i for i, v in enumerate(short) if v.shape[1:] == u.shape[1:]] for u in short}
    for members in shapes.values():
        stack = torch.cat([short[i] for i in members])
        directions = newton_schulz(stack.flatten(), (stack.shape,)).view(stack.shape)
        for i, o in zip(members, directions.split([len(short[i]) for i in members]), strict=True):
            updates[i] = o.mT if updates[i].size(1) > updates[i].size(2) else o
    scaled = [
        (o * (lr * RMS * math.sqrt(max(o.shape[1:])))).reshape(p.shape).to(p.dtype)
        for o, p in zip(updates, params, strict=True)
    ]
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_sub_(params, scaled)


@torch.no_grad()
def adamw(
    params, grads, exp_avgs, exp_avg_sqs, lrs, weight_decays, beta1, beta2, eps, step, clip_scale=1.0
) -> Tensor:  # fmt: skip
    """clip_grad_norm_ and torch.optim.AdamW(fused=True) for one group: the norm, the gradients scaled, the update.

    Changes the gradients too; takes the first of `lrs` and `weight_decays`. Returns the norm.
    """
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, clip_scale)
    steps = list(torch.full((len(params),), float(step), device=params[0].device).unbind())
    torch._fused_adamw_(  # what torch.optim.AdamW(fused=True).step() calls
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lrs[0], beta1=beta1, beta2=beta2,
        weight_decay=weight_decays[0], eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    return norm
