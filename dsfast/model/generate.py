"""Text from a model: greedy or sampled, one prompt or a batch, with the latent cache."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from dsfast.errors import UserError
from dsfast.model.decode import OperatorDecoder, Prompts
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.native_decode import NativeDecoder
from dsfast.model.native_model import runs_natively
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
    packed = Prompts.pack(prompts, device)
    model.check_ids(packed.ids)
    limit = model.config.max_position_embeddings
    room = [min(max_new_tokens, limit - len(prompt) + 1) for prompt in prompts]  # the last token is never read back
    capacity = max(len(prompt) + n - 1 for prompt, n in zip(prompts, room, strict=True))
    decoder_type = NativeDecoder if runs_natively(model) else OperatorDecoder
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        decoder = decoder_type(model, len(prompts), capacity, temperature, generator)
        return _collect(decoder, packed, room, eos_id)
    finally:
        if was_training:
            model.train()


def _collect(
    decoder: OperatorDecoder | NativeDecoder, prompts: Prompts, room: list[int], eos_id: int | None
) -> list[list[int]]:
    """Each row's new tokens, until it ends with `eos_id` or has `room[row]` of them."""
    new: list[list[int]] = [[] for _ in room]
    running = set(range(len(room)))
    chosen = decoder.start(prompts)
    while True:
        for row, token in enumerate(chosen):
            if row in running and token != eos_id:
                new[row].append(token)
            if token == eos_id or len(new[row]) == room[row]:
                running.discard(row)
        if not running:
            return new
        chosen = decoder.step()


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
