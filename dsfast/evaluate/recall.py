"""How much of what was taught a model can say, in the phrasings it read and in phrasings held out from training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from dsfast.data import Fact, Prompt, heldout_prompts, taught_prompts
from dsfast.evaluate.probes import check_lengths, continue_greedily, judge
from dsfast.model import DeepseekV3

_ROOM = 3  # tokens beyond the longest answer: an article, a full stop, the end of a word


@dataclass(frozen=True)
class Recall:
    """`correct` of `asked` prompts answered exactly; `low` and `high` bound the fraction (Wilson, 95%)."""

    asked: int
    correct: int
    fraction: float
    low: float
    high: float


def measure_recall(model: DeepseekV3, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Recall | None:
    """The exact answers to `prompts`, in batches; None where there are no prompts."""
    if not prompts:
        return None
    answers = [" " + answer for prompt in prompts for answer in (prompt.answer, *prompt.aliases)]
    longest = max(len(encoding.ids) for encoding in tokenizer.encode_batch(answers, add_special_tokens=False))
    generated = continue_greedily(model, tokenizer, [prompt.text for prompt in prompts], longest + _ROOM)
    correct = sum(judge(prompt, text, 0.0).exact for prompt, text in zip(prompts, generated, strict=True))
    return Recall(len(prompts), correct, correct / len(prompts), *wilson_interval(correct, len(prompts)))


def _questions(facts: Sequence[Fact]) -> dict[str, list[Prompt]]:
    """About `facts` in the phrasings of the training text, "taught", and in those held out from it, "heldout"."""
    return {
        name: [prompt for fact in facts for prompt in phrasings(fact)]
        for name, phrasings in (("taught", taught_prompts), ("heldout", heldout_prompts))
    }


def measure_taught(model: DeepseekV3, tokenizer: Tokenizer, facts: Sequence[Fact]) -> dict[str, Recall | None]:
    """Recall of `facts`, by the names of `_questions`."""
    return {name: measure_recall(model, tokenizer, prompts) for name, prompts in _questions(facts).items()}


def as_json(recall: Mapping[str, Recall | None]) -> dict[str, dict[str, Any] | None]:
    """What `measure_taught` found, for a JSON file."""
    return {name: value and asdict(value) for name, value in recall.items()}


def check_taught(tokenizer: Tokenizer, facts: Sequence[Fact], context: int) -> None:
    """Raise UserError, as `check_lengths`, where something that `measure_taught` asks about `facts` does not fit."""
    for prompts in _questions(facts).values():
        check_lengths(tokenizer, prompts, context)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% score interval of a binomial fraction (Wilson 1927). Raises ValueError without trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"expected 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    z = 1.959964
    p, z2 = successes / trials, z * z
    centre = p + z2 / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
