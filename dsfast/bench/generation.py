"""`bench generate`: tokens per second of greedy generation, against transformers' generate on the exported model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsfast.bench.peers import huggingface
from dsfast.bench.step import attempt
from dsfast.bench.timing import compare
from dsfast.errors import UserError
from dsfast.files import Json
from dsfast.model import DeepseekV3, generate_ids, why_not_exported

PROMPT_TOKENS = 8
TOLERANCE = 1e-3
"""Of the largest logit: how far the two models may lie apart after the prompt."""


def run_generate(
    model: DeepseekV3, batches: Sequence[int], new_tokens: int, repeats: int, progress: Callable[[str], None],
    ours: Callable = generate_ids, others: Mapping[str, Callable] = MappingProxyType({}),
) -> Json:  # fmt: skip
    """Time `new_tokens` tokens for each batch size; `progress` is told what comes next.

    ours: what is timed as dsfast; others: what it is timed against beside the peer, each called as `generate_ids`.
    Returns `status` ("timed", "missing", "failed" or "wrong", of the peer), `reason` and `batches`, a list of batch, tokens,
    seconds, tokens_per_second, others (name -> comparison; first: dsfast), different (those of them that gave other tokens
    than dsfast) and, where the peer was timed, comparison.
    Raises UserError where prompt and new tokens do not fit the context.
    """
    limit = model.config.max_position_embeddings
    if PROMPT_TOKENS + new_tokens > limit:
        fits = limit - PROMPT_TOKENS
        raise UserError(f"--new-tokens: expected at most {fits} (the context less the prompt), got {new_tokens}")
    model.eval()
    peer, status, reason = _load_peer(model, _prompts(model, max(batches)))
    rows = []
    for batch in batches:
        progress(f"generate, batch {batch}")
        prompts = _prompts(model, batch)
        theirs = None if peer is None else partial(_generate_theirs, peer, prompts, new_tokens)
        calls = [partial(call, model, prompts.tolist(), new_tokens) for call in (ours, *others.values())]
        expected = calls[0]() if others else None
        different = [name for name, call in zip(others, calls[1:], strict=True) if call() != expected]
        timed = _timed(calls[0], theirs, dict(zip(others, calls[1:], strict=True)), batch, batch * new_tokens, repeats)
        rows.append(timed | {"different": different})
    return {"status": status, "reason": reason, "batches": rows}


def _load_peer(model: DeepseekV3, prompts: Tensor) -> tuple[Any, str, str]:
    """(the model in transformers, or None where it cannot be timed; status; reason)."""
    if missing := huggingface.missing() or why_not_exported(model.config):
        return None, "missing", missing

    def tried() -> tuple[Any, str]:
        peer = huggingface.from_dsfast(model).eval().to(model.embed_tokens.weight.device)
        peer.generation_config.eos_token_id = None  # both sides go on to the last token
        _generate_theirs(peer, prompts, 2)
        return peer, _difference(model, peer, prompts)

    found, problem = attempt(tried)
    if problem:
        return None, "failed", problem
    peer, difference = found
    return (None, "wrong", difference) if difference else (peer, "timed", "")


def _prompts(model: DeepseekV3, batch: int) -> Tensor:
    """Random tokens [batch, PROMPT_TOKENS]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).to(
        model.embed_tokens.weight.device
    )


@torch.inference_mode()
def _difference(model: DeepseekV3, peer: Any, prompts: Tensor) -> str:
    """How the logits after `prompts` differ, in words; "" where they agree."""
    expected = peer(prompts).logits[:, -1]
    error, allowed = (model(prompts)[:, -1] - expected).abs().max(), TOLERANCE * expected.abs().max()
    return "" if error <= allowed else f"logits differ by {error:.2e}, at most {allowed:.2e} is right"


def _generate_theirs(peer: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    mask = torch.ones_like(prompts)
    new = peer.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
    return new.cpu()  # dsfast's ids are on the host as well


def _timed(
    ours: Callable, theirs: Callable | None, others: Mapping[str, Callable], batch: int, tokens: int, repeats: int
) -> Json:
    # Without a peer dsfast takes turns with itself: the same code, half the samples unused.
    pairs = compare(ours, {"transformers": theirs or ours, **others}, repeats, warmup=1)
    pair = pairs.pop("transformers")
    row = {
        "batch": batch,
        "tokens": tokens,
        "seconds": asdict(pair.first),
        "tokens_per_second": tokens / pair.first.median,
        "others": {name: asdict(comparison) for name, comparison in pairs.items()},
    }
    if theirs is not None:
        row |= {"comparison": asdict(pair), "peer_tokens_per_second": tokens / pair.other.median}
    return row
