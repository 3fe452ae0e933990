"""What each operator is timed against on a GPU, each prepared as it likes its inputs best.

A peer's expanding, padding and concatenating is done before the clock starts, though a user of MLA pays for it.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsfast import ops
from dsfast.bench.gpu.cases import GpuCase, unchanged
from dsfast.bench.peers import huggingface
from dsfast.bench.peers import operators as eager
from dsfast.ops import triton


class RefusedError(Exception):
    """The peer does not take these inputs."""


@dataclass(frozen=True)
class Prepared:
    """run(): the forward pass; leaves: what gradients are wanted for; result: what `run` returns as the operator's outputs."""

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...]
    result: Callable[[Any], Any] = unchanged


@dataclass(frozen=True)
class GpuPeer:
    """prepare(arguments of the operator, positions that want gradients) -> Prepared; missing(): why it cannot run, or "".

    compiled: whether torch.compile makes it, for each size anew.
    """

    what: str
    prepare: Callable[[list, Sequence[int]], Prepared]
    missing: Callable[[], str] = lambda: ""
    compiled: bool = False


def direct(function: Callable, arguments: list, differentiable: Sequence[int]) -> Prepared:
    """`function` on the operator's own arguments."""
    inputs = list(arguments)
    for position in differentiable:
        inputs[position] = arguments[position].detach().clone().requires_grad_()
    return Prepared(partial(function, *inputs), tuple(inputs[position] for position in differentiable))


def _plain(what: str, function: Callable, missing: Callable[[], str] = lambda: "") -> GpuPeer:
    return GpuPeer(what, partial(direct, function), missing)


def _compiled(what: str, function: Callable) -> GpuPeer:
    def prepare(arguments: list, differentiable: Sequence[int]) -> Prepared:
        return direct(torch.compile(function), arguments, differentiable)

    return _compiled_by(f"torch.compile of {what}", prepare)


def _compiled_by(what: str, prepare: Callable[[list, Sequence[int]], Prepared]) -> GpuPeer:
    return GpuPeer(what, prepare, no_gpu, compiled=True)


def no_gpu() -> str:
    """Why what is compiled for a GPU cannot run."""
    return "" if torch.cuda.is_available() else "compiled for a GPU, and torch finds none"


def no_liger() -> str:
    return "" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def no_varlen() -> str:
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    return ("" if found else "torch has it from 2.10 on") or no_gpu()


def peers_of(case: GpuCase) -> dict[str, GpuPeer]:
    """Name -> what `case` is timed against."""
    if case.part == "adamw":
        return {"torch fused": _ADAMW["clip" if case.ours is not ops.adamw else "update"]} | _ADAMW_OTHERS
    return _PEERS[case.part]


# attention


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
    """With values of their own width where `attend` takes them, else as wide as the keys."""
    width, value = _widths(arguments)
    attempts = [
        partial(_prepared_heads, attend, arguments, rows, bool(differentiable), width, v)
        for v in dict.fromkeys((value, width))
    ]
    return _first_taken(attempts, differentiable)


def _compiled_attention(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """From the operator's own arguments: the compiler is to make what a user would else expand and concatenate."""
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
        from dsfast.bench.gpu.launched import replaced
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


# decode


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


# route


def _with_permutation(weights: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    return weights, indices, counts, indices.flatten().argsort(stable=True)


def _eager_route(*arguments) -> tuple[Tensor, ...]:
    return _with_permutation(*eager.choose_experts(*arguments))


def _transformers_route(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """The router on hidden states that are the logits (its weight the identity), whose product is not timed."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    logits, bias, top_k, n_group, topk_group, norm, scaling = arguments
    config = hf.DeepseekV3Config(
        hidden_size=logits.size(1), n_routed_experts=logits.size(1), num_experts_per_tok=top_k, n_group=n_group,
        topk_group=topk_group, norm_topk_prob=norm, routed_scaling_factor=scaling,
    )  # fmt: skip
    router = hf.DeepseekV3TopkRouter(config).to(logits.device)
    router.e_score_correction_bias.copy_(bias)
    leaf = logits.detach().clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        with _linear_skipped(hf):
            _, weights, indices = router(leaf)
        return _with_permutation(weights, indices, eager.counted(indices, logits.size(1)))

    return Prepared(run, (leaf,))


class _linear_skipped:  # noqa: N801
    """transformers' `F.linear` in the router returns its input: the logits are given."""

    def __init__(self, module: Any):
        self.module = module

    def __enter__(self) -> None:
        self.kept, self.module.F = self.module.F, self

    def __exit__(self, *_) -> None:
        self.module.F = self.kept

    @staticmethod
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return x


# experts and MLP


def grouped_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Slots sorted by expert, two grouped products, the sum of each token's slots through the inverse permutation."""
    slots = indices.flatten()
    order = slots.argsort(stable=True)
    ends = eager.counted(slots, gate_up.size(0)).cumsum(0).to(torch.int32)
    taken = x[order // indices.size(1)]
    gate, up = torch._grouped_mm(taken, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (out[inverse].unflatten(0, indices.shape) * weights[..., None]).sum(1)


def _transformers_experts(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """With transformers' own grouped products."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    e, d, i = arguments[4].shape
    experts = hf.DeepseekV3Experts(hf.DeepseekV3Config(hidden_size=d, n_routed_experts=e, moe_intermediate_size=i))
    experts.config._experts_implementation = "grouped_mm"

    def run(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(experts, {"gate_up_proj": gate_up, "down_proj": down}, (x, indices, weights))

    return direct(run, arguments, differentiable)


def _liger_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), weights)


def _liger_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return functional.linear(LigerSiLUMulFunction.apply(*functional.linear(x, gate_up).chunk(2, -1)), down)


# head

CHUNK = 1024
"""Rows whose logits exist at a time."""


def chunked_head(part: Callable, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`part(hidden, weight, labels)`, a sum of losses, chunk by chunk, recomputed for the backward pass."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(part, rows, weight, wanted, use_reentrant=False)
    return total / (labels != -100).sum()


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels, reduction="sum")


def _compiled_chunks(arguments: list, differentiable: Sequence[int]) -> Prepared:
    return direct(partial(chunked_head, torch.compile(summed_loss)), arguments, differentiable)


def _liger_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


# norm, rope


def _transformers_norm(arguments: list, differentiable: Sequence[int]) -> Prepared:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    norm = DeepseekV3RMSNorm(arguments[1].size(0), arguments[2])

    def run(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return torch.func.functional_call(norm, {"weight": weight}, (h,)), h

    return direct(run, arguments, differentiable)


def _for_halves(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> list[Tensor]:
    """cos and sin [1, N, Dr], of x's dtype, for rotations that leave a pair's halves apart."""
    return [table[positions].to(x.dtype).repeat(1, 2)[None] for table in (cos, sin)]


def _pairs(halves: Tensor) -> Tensor:
    """Each pair's two side by side again."""
    return halves.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _transformers_rope(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """Which leaves a pair's halves apart, and is given no heads of keys."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    x, (cos, sin) = arguments[0], _for_halves(*arguments)
    leaf = x.detach().clone().requires_grad_()

    def run() -> Tensor:
        return apply_rotary_pos_emb_interleave(leaf[None], leaf[None, :, :0], cos, sin, unsqueeze_dim=2)[0]

    return Prepared(run, (leaf,), lambda y: _pairs(y[0]))


def _liger_rope(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """Which turns halves: a pair's two are brought there before the clock starts, and back after it."""
    from liger_kernel.ops.rope import LigerRopeFunction

    x, (cos, sin) = arguments[0], _for_halves(*arguments)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).transpose(0, 1)[None]
    leaf, none = halves.detach().clone().requires_grad_(), halves[:, :1].detach().clone()

    def run() -> Tensor:
        return LigerRopeFunction.apply(leaf, none, cos, sin)[0]  # in place: what is turned already takes as long

    return Prepared(run, (leaf,), lambda y: _pairs(y[0].transpose(0, 1)))


def _liger_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    h = x + residual
    return LigerRMSNormFunction.apply(h, weight, eps), h


# AdamW, and what stands around attention


def _fused_adamw(clip: bool, arguments: list, differentiable: Sequence[int]) -> Prepared:
    """What torch.optim.AdamW(fused=True).step() calls, and before it the clip that leaves the gradients' scale in place."""
    params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, _ = arguments
    steps = list(torch.full((len(params),), float(step), device=params[0].device).unbind())

    @torch.no_grad()
    def run() -> None:
        if clip:
            norm = torch.nn.utils.get_total_norm(grads)
            torch._foreach_mul_(grads, (1.0 / norm).clamp(max=1.0))
        torch._fused_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lrs[0], beta1=beta1, beta2=beta2,
            weight_decay=decays[0], eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    return Prepared(run, ())


def _compiled_adamw(arguments: list, differentiable: Sequence[int]) -> Prepared:
    params, grads, exp_avgs, exp_avg_sqs, lrs, decays, beta1, beta2, eps, step, _ = arguments
    leaves = [p.detach().requires_grad_() for p in params]  # which share their memory
    optimizer = torch.optim.AdamW(
        leaves, lr=lrs[0], betas=(beta1, beta2), eps=eps, weight_decay=decays[0], foreach=True, capturable=leaves[0].is_cuda
    )  # fmt: skip
    for leaf, grad, exp_avg, exp_avg_sq in zip(leaves, grads, exp_avgs, exp_avg_sqs, strict=True):
        leaf.grad = grad
        before = torch.tensor(step - 1.0, device=leaf.device)
        optimizer.state[leaf] = {"step": before, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return Prepared(torch.compile(lambda: optimizer.step()), ())


def _project_by_operators(
    delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
) -> tuple[Tensor, ...]:  # fmt: skip
    """As dsfast/model/attention.py does where a model is wider."""
    *x, h = ops.stream_norm(delta, norm, eps, residual, 2)
    queries, keys = functional.linear(x[0], q).unflatten(-1, (heads, -1)), functional.linear(x[1], kv_a)
    q_nope, q_rope, latent, k_rope = ops.split_and_turn(queries, keys, cos, sin, positions)
    latent = ops.rms_norm(latent, latent_norm, latent_eps)
    plain = q_nope.size(-1)
    key_values = functional.linear(latent, kv_b).unflatten(-1, (heads, -1))
    k_nope, v = key_values.split((plain, key_values.size(-1) - plain), -1)
    return h, q_nope, q_rope, k_nope, k_rope, v


def _output_by_operators(values, o, residual, norm, eps, uses) -> tuple[Tensor, ...]:
    return ops.stream_norm(functional.linear(values, o), norm, eps, residual, uses)


def _reference(operator: str, function: Callable) -> Callable:
    def run(*arguments):
        with ops.use("reference", operator):
            return function(*arguments)

    return run


def _eager_adamw(*arguments) -> None:
    with torch.no_grad():
        _reference("adamw", ops.adamw)(*arguments)


def _eager_muon(params: list, *arguments) -> None:
    eager.muon(params, *arguments, dtype=torch.bfloat16 if params[0].is_cuda else None)


_ADAMW = {
    "update": GpuPeer("torch._fused_adamw_", partial(_fused_adamw, False)),
    "clip": GpuPeer("total norm, foreach scaling, torch._fused_adamw_", partial(_fused_adamw, True)),
}
_ADAMW_OTHERS = {
    "eager": _plain("tensor by tensor, no clip", _eager_adamw),
    "compile": _compiled_by("torch.compile of torch.optim.AdamW(foreach=True).step, no clip", _compiled_adamw),
}

_PEERS: dict[str, dict[str, GpuPeer]] = {
    "attention": {
        "FlexAttention": _compiled_by("flex_attention", _flex),
        **{
            f"SDPA {name}": GpuPeer(f"scaled_dot_product_attention, {name} forced", partial(_sdpa, backend))
            for name, backend in {
                "flash": SDPBackend.FLASH_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION,
                "math": SDPBackend.MATH,
            }.items()
        },
        "varlen": GpuPeer("torch.nn.attention.varlen", _varlen, no_varlen),
        "scores anew": GpuPeer("dsfast's kernels that make scores twice and keep none", _scores_anew, triton.missing),
        "eager": _plain("the reference, scores in memory", _reference("mla_attention", ops.mla_attention)),
        "compile": _compiled_by("torch.compile of scaled_dot_product_attention with its expanding", _compiled_attention),
    },
    "experts": {
        "grouped_mm": _plain("sort, torch._grouped_mm twice, unsort", grouped_experts),
        "compile": _compiled("grouped_mm", grouped_experts),
        "transformers": GpuPeer("DeepseekV3Experts by grouped_mm", _transformers_experts, huggingface.missing),
        "liger": _plain("LigerFusedMoEFunction", _liger_experts, no_liger),
        "eager": _plain("a loop over experts", eager.moe_experts),
    },
    "head": {
        "eager chunked": _plain(f"cross_entropy, {CHUNK} rows at a time", partial(chunked_head, summed_loss)),
        "compile chunked": _compiled_by("torch.compile of a chunk", _compiled_chunks),
        "liger": _plain("LigerFusedLinearCrossEntropyLoss()", _liger_head, no_liger),
        "eager": _plain("all logits at once", eager.linear_cross_entropy),
    },
    "decode": {
        "eager": _plain("absorbed, einsum and softmax", eager.mla_decode),
        "compile": _compiled("it", eager.mla_decode),
        "SDPA expanded": GpuPeer("scaled_dot_product_attention over keys and values of all heads", _expanded_decode),
    },
    "route": {
        "transformers": GpuPeer("DeepseekV3TopkRouter without its product, argsort", _transformers_route, huggingface.missing),
        "eager": _plain("topk, gather, argsort", _eager_route),
        "compile": _compiled("it", _eager_route),
    },
    "norm": {
        "eager": _plain("add and functional.rms_norm", eager.rms_norm),
        "compile": _compiled("it", eager.rms_norm),
        "transformers": GpuPeer("add and DeepseekV3RMSNorm", _transformers_norm, huggingface.missing),
        "liger": _plain("LigerRMSNormFunction", _liger_norm, no_liger),
    },
    "rope": {
        "eager": _plain("stack of two rotations", eager.rope),
        "compile": _compiled("it", eager.rope),
        "transformers": GpuPeer("apply_rotary_pos_emb_interleave", _transformers_rope, huggingface.missing),
        "liger": GpuPeer("LigerRopeFunction, halves given, in place", _liger_rope, no_liger),
    },
    "muon": {"eager": _plain("foreach, equal matrices by bmm", _eager_muon), "compile": _compiled("it", _eager_muon)},
    "newton_schulz": {
        "eager": _plain("bmm, baddbmm, baddbmm", eager.newton_schulz), "compile": _compiled("it", eager.newton_schulz),
    },
    "mlp": {
        "eager": _plain("linear, silu, linear, as transformers'", eager.swiglu_mlp),
        "compile": _compiled("it", eager.swiglu_mlp),
        "liger": _plain("LigerSiLUMulFunction", _liger_mlp, no_liger),
    },
    "embedding": {"eager": _plain("embedding, matmul", eager.embedding), "compile": _compiled("it", eager.embedding)},
    "project": {
        "operators": _plain("dsfast's own operators, one after the other", _project_by_operators),
        "eager": _plain("rms_norm, linear, rotations", eager.mla_project),
        "compile": _compiled("it", eager.mla_project),
    },
    "output": {
        "operators": _plain("dsfast's own operators, one after the other", _output_by_operators),
        "eager": _plain("linear, add, rms_norm", eager.mla_output),
        "compile": _compiled("it", eager.mla_output),
    },
}  # fmt: skip
