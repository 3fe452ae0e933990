"""Prompts put to a model, greedily, and what came back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from dsfast.data import Prompt
from dsfast.errors import UserError
from dsfast.evaluate.similarity import Similarity, exact_match, similarity
from dsfast.model import DeepseekV3, generate, generate_ids
from dsfast.model.generate import special_id
from dsfast.tokens import BOS, EOS


@dataclass(frozen=True)
class ProbeResult:
    """One prompt and its continuation. `seconds`: from the prompt to the whole answer."""

    prompt: Prompt
    generated: str
    seconds: float
    similarity: Similarity
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Flat and ready for JSON; similarities are fractions in 0..1."""
        return {
            "prompt": self.prompt.text,
            "expected": self.prompt.answer,
            "aliases": list(self.prompt.aliases),
            "priority": self.prompt.priority,
            "generated": self.generated,
            "exact": self.exact,
            "similarity": asdict(self.similarity),
            "seconds": self.seconds,
        }


def ask(model: DeepseekV3, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int) -> list[ProbeResult]:
    """Each prompt by itself and timed, as a user would ask it. Raises UserError for one longer than the context."""
    results = []
    for prompt in prompts:
        start = time.perf_counter()
        generated = generate(model, tokenizer, prompt.text, max_new_tokens=max_new_tokens)
        results.append(judge(prompt, generated, time.perf_counter() - start))
    return results


def judge(prompt: Prompt, generated: str, seconds: float) -> ProbeResult:
    """What the continuation is worth. One that goes on with the prompt's last word ("in" + "dia") is no answer."""
    begins_a_word = not generated[:1].isalnum()
    exact = begins_a_word and exact_match(generated, prompt.answer, prompt.aliases)
    return ProbeResult(prompt, generated, seconds, similarity(generated, prompt.answer), exact)


def continue_greedily(
    model: DeepseekV3, tokenizer: Tokenizer, texts: Sequence[str], max_new_tokens: int, batch_size: int = 256
) -> list[str]:
    """The continuations of `texts`, computed `batch_size` at a time; each is what `generate` gives for it alone."""
    eos = special_id(tokenizer, EOS)
    prompts = encode_prompts(tokenizer, texts)
    continuations = []
    for start in range(0, len(prompts), batch_size):
        new = generate_ids(model, prompts[start : start + batch_size], max_new_tokens, eos_id=eos)
        continuations += [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
    return continuations


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each text as token ids, <|bos|> first."""
    bos = special_id(tokenizer, BOS)
    return [[bos, *encoding.ids] for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def check_lengths(tokenizer: Tokenizer, prompts: Sequence[Prompt], context: int) -> None:
    """Raise UserError for a prompt that does not fit into `context` tokens, before any work is done on the others."""
    for prompt, ids in zip(prompts, encode_prompts(tokenizer, [p.text for p in prompts]), strict=True):
        if len(ids) > context:
            raise UserError(
                f"prompt {prompt.text[:40]!r}: {len(ids)} tokens; at most {context} (max_position_embeddings)"
            )
