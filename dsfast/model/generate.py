"""Text from a model: greedy or sampled, one prompt or a batch, with the latent cache."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsfast.errors import UserError
from dsfast.model.cache import LatentCache
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.tokens import BOS, EOS


def generate(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The continuation of `prompt`, without the prompt; ends at <|eos|>, after `max_new_tokens` or with the context.

    Temperature 0 takes the likeliest token; above 0 it samples, repeatably by `seed`.
    Raises UserError for a prompt longer than the context or not encodable as UTF-8, max_new_tokens < 1, a negative
    temperature or a seed outside 0 .. 2**63 - 1.
    """
    _check_text(prompt)
    ids = [special_id(tokenizer, BOS), *tokenizer.encode(prompt, add_special_tokens=False).ids]
    [new] = generate_ids(model, [ids], max_new_tokens, temperature, seed, special_id(tokenizer, EOS))
    return tokenizer.decode(new, skip_special_tokens=True)


@torch.inference_mode()
def generate_ids(
    model: DeepseekV3,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Continue each of `prompts` (token ids, any lengths from 1 on); the new ids alone, without `eos_id`.

    Greedy continuations do not depend on which prompts share the batch. Otherwise as `generate`.
    """
    _check(model, prompts, max_new_tokens, temperature, seed)
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    limit = model.config.max_position_embeddings
    room = [min(max_new_tokens, limit - len(prompt) + 1) for prompt in prompts]  # the last token is never read back
    new: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    was_training = model.training
    model.eval()
    try:
        capacity = max(len(prompt) + n - 1 for prompt, n in zip(prompts, room, strict=True))
        cache = LatentCache(model.config, len(prompts), capacity, device, model.embed_tokens.weight.dtype)
        logits = _prefill(model, prompts, cache)
        while True:
            chosen = _choose(logits, temperature, generator)
            for row, token in enumerate(chosen.tolist()):
                if row in running and token != eos_id:
                    new[row].append(token)
                if token == eos_id or len(new[row]) == room[row]:
                    running.discard(row)
            if not running:
                return new
            logits = _decode(model, chosen, cache)
    finally:
        model.train(was_training)


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises UserError if the tokenizer has none."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"tokenizer: special token {token!r} is missing from its vocabulary")
    return number


def _check_text(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt: expected text that UTF-8 can hold, got {prompt[error.start]!r} at character {error.start}"
        ) from None


def _check(model: DeepseekV3, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int) -> None:
    limit = model.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise UserError(f"temperature: expected at least 0, got {temperature}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: expected 0 .. {2**63 - 1}, got {seed}")
    if not prompts:
        raise UserError("prompts: expected at least one, got none")
    for prompt in prompts:
        if not 1 <= len(prompt) <= limit:
            raise UserError(
                f"prompt: expected 1 .. {limit} tokens, <|bos|> included (max_position_embeddings), got {len(prompt)}"
            )


def _prefill(model: DeepseekV3, prompts: list[list[int]], cache: LatentCache) -> Tensor:
    """Fill the cache with the prompts, packed end to end; the logits after each [B, V]."""
    device = cache.lengths.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = lengths.cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    rows = torch.repeat_interleave(torch.arange(len(prompts), device=device), lengths)
    positions = torch.arange(len(ids), device=device) - (ends - lengths)[rows]
    model.check_ids(ids)
    cache.place(rows, positions)
    hidden = model.hidden(model.embed_tokens(ids), positions, cu_seqlens, cache)
    return model.logits(hidden[ends - 1])


def _decode(model: DeepseekV3, tokens: Tensor, cache: LatentCache) -> Tensor:
    """Append one token [B] to each sequence; the logits after it [B, V].

    A sequence that has ended goes on overwriting its last place: what it says is no longer read.
    """
    positions = cache.lengths.clamp(max=cache.capacity - 1)
    cache.place(torch.arange(len(tokens), device=tokens.device), positions)
    return model.logits(model.hidden(model.embed_tokens(tokens), positions, None, cache))


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """[B, V] -> the next tokens [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    below_best = logits.double() - logits.amax(-1, keepdim=True)  # no temperature, however small, makes 0 overflow
    return torch.multinomial((below_best / temperature).softmax(-1), 1, generator=generator).squeeze(1)
