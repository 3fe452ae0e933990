"""Peers of what stands before and behind attention in a narrow layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from dsfast import ops
from dsfast.bench.gpu.peers.peer import GpuPeer, Prepared, compiled, direct, plain
from dsfast.bench.peers import operators as eager


def _project_by_operators(
    delta, residual, norm, eps, q, kv_a, latent_norm, latent_eps, kv_b, heads, cos, sin, positions
) -> tuple[Tensor, ...]:  # fmt: skip
    """What dsfast's model calls where it is wider."""
    *x, h = ops.stream_norm(delta, norm, eps, residual, 2)
    queries, keys = functional.linear(x[0], q).unflatten(-1, (heads, -1)), functional.linear(x[1], kv_a)
    q_nope, q_rope, latent, k_rope = ops.split_and_turn(queries, keys, cos, sin, positions)
    latent = ops.rms_norm(latent, latent_norm, latent_eps)
    plain = q_nope.size(-1)
    key_values = functional.linear(latent, kv_b).unflatten(-1, (heads, -1))
    k_nope, v = key_values.split((plain, key_values.size(-1) - plain), -1)
    return h, q_nope, q_rope, k_nope, k_rope, v


def _prepared_operators(arguments: list, differentiable: Sequence[int]) -> Prepared:
    """The rope key is not expanded to the heads: attention takes it as it is."""
    prepared = direct(_project_by_operators, arguments, differentiable)
    return replace(
        prepared, result=lambda outputs: (*outputs[:4], outputs[4][:, None].expand(outputs[2].shape), outputs[5])
    )


def _output_by_operators(values, o, residual, norm, eps, uses) -> tuple[Tensor, ...]:
    return ops.stream_norm(functional.linear(values, o), norm, eps, residual, uses)


PEERS: dict[str, dict[str, GpuPeer]] = {
    "project": {
        "operators": GpuPeer("dsfast's own operators, one after the other", _prepared_operators),
        "eager": plain("rms_norm, linear, rotations", eager.mla_project),
        "compile": compiled("it", eager.mla_project),
    },
    "output": {
        "operators": plain("dsfast's own operators, one after the other", _output_by_operators),
        "eager": plain("linear, add, rms_norm", eager.mla_output),
        "compile": compiled("it", eager.mla_output),
    },
}
