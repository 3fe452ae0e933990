"""Text from a model: greedy or sampled, one prompt or a batch, with the latent cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import inf

import torch
from tokenizers import Tokenizer

from dsfast.errors import UserError
from dsfast.model.changed import note_changed
from dsfast.model.decode import OperatorDecoder, Prompts
from dsfast.model.deepseek_v3 import DeepseekV3
from dsfast.model.device_decode import DeviceDecoder
from dsfast.model.gpu import gpu_errors
from dsfast.model.native_decode import NativeDecoder, stands_for
from dsfast.model.native_model import runs_natively
from dsfast.tokens import BOS, EOS

Decoder = OperatorDecoder | NativeDecoder | DeviceDecoder


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
    temperature, a seed outside 0 .. 2**63 - 1, and a model whose logits are not finite.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"tokenizer: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
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
    decoder_type: Callable[..., Decoder] | None = None,
) -> list[list[int]]:
    """Continue each of `prompts` (token ids, any lengths from 1 on); the new ids alone, without `eos_id`.

    Greedy continuations do not depend on which prompts share the batch; of a model in 16 bits on a GPU only up to the first token
    at which two come as near as a rounding. `decoder_type`: in place of the device's own. On a GPU a model generates for one call
    at a time, and keeps the memory of the last for the next. Otherwise as `generate`; raises UserError also where a GPU fails or
    has too little memory.
    """
    _check(model, prompts, max_new_tokens, temperature, seed)
    packed = Prompts.pack(prompts)
    limit, batch = model.config.max_position_embeddings, len(prompts)
    room = [min(max_new_tokens, limit - len(prompt) + 1) for prompt in prompts]  # the last token is never read back
    capacity = max(len(prompt) + n - 1 for prompt, n in zip(prompts, room, strict=True))
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with gpu_errors(
            lambda said: (
                f"out of GPU memory with {batch} prompts at once and {capacity} tokens each: lower one ({said})"
            ),
            lambda said: f"the GPU failed while generating: {said}",
        ):
            generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
            decoder = (decoder_type or _own_decoder(model))(model, batch, capacity, temperature, generator)
            return _collect(decoder, packed, room, eos_id)
    finally:
        if was_training:
            model.train()


def _own_decoder(model: DeepseekV3) -> Callable[..., Decoder]:
    """What generates on the model's device."""
    if model.embed_tokens.weight.is_cuda:
        return OperatorDecoder if note_changed(model) else DeviceDecoder
    return NativeDecoder if runs_natively(model) and stands_for(model) else OperatorDecoder


def _collect(decoder: Decoder, prompts: Prompts, room: list[int], eos_id: int | None) -> list[list[int]]:
    """Each row's new tokens, until it ends with `eos_id` or has `room[row]` of them."""
    steps = [decoder.start(prompts)]
    ends = list(room)
    while True:
        if eos_id in steps[-1]:
            ended = len(steps) - 1
            ends = [min(end, ended) if token == eos_id else end for end, token in zip(ends, steps[-1], strict=True)]
        if len(steps) >= max(ends):
            return [list(row[:end]) for row, end in zip(zip(*steps, strict=True), ends, strict=True)]
        steps.append(decoder.step())


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises UserError if the tokenizer has none."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"tokenizer: special token {token!r} is missing from its vocabulary")
    return number


def _check_text(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise UserError(f"prompt: expected a string, got {type(prompt).__name__}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt: expected text that UTF-8 can hold, got {prompt[error.start]!r} at character {error.start}"
        ) from None


def _check(model: DeepseekV3, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int) -> None:
    if not isinstance(model, DeepseekV3):
        raise UserError(f"model: expected a DeepseekV3, got {type(model).__name__}")
    limit, words = model.config.max_position_embeddings, model.config.vocab_size
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected a whole number of at least 1, got {max_new_tokens!r}")
    if not isinstance(temperature, int | float) or not temperature >= 0 or sys.float_info.max < temperature < inf:
        raise UserError(f"temperature: expected a number of at least 0, got {str(temperature)[:60]}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"seed: expected a whole number 0 .. {2**63 - 1}, got {seed!r}")
    if not isinstance(prompts, list | tuple):
        raise UserError(f"prompts: expected a list of lists of token ids, got {type(prompts).__name__}")
    if not prompts:
        raise UserError("prompts: expected at least one, got none")
    for number, prompt in enumerate(prompts):
        which = "prompt" if len(prompts) == 1 else f"prompts[{number}]"
        if not isinstance(prompt, list):
            raise UserError(f"{which}: expected a list of token ids, got {type(prompt).__name__}")
        for token in prompt:
            if type(token) is not int or not 0 <= token < words:
                raise UserError(f"{which}: expected token ids 0 .. {words - 1}, got {token!r}")
        if not 1 <= len(prompt) <= limit:
            raise UserError(
                f"{which}: expected 1 .. {limit} tokens, <|bos|> included (max_position_embeddings), got {len(prompt)}"
            )
