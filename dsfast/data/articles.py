"""The encyclopedia's writer: facts in, about max_articles short articles out, the same for the same seed.

An article states facts of one topic in varied phrasings and in random order, so that no fact predicts the next, and
begins with one of them. Every fact is stated about equally often over all articles, times its topic's boost.
Sentences about nothing make up about an eighth of the tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from dsfast.data.facts import Fact, heldout_prompts, taught_prompts
from dsfast.errors import UserError

FACT_SENTENCES = (7, 20)  # the least and the most an article has; 60 to 250 tokens with the filler
FILLER_SHARE = 0.13  # chance of a filler sentence after a fact; filler is an eighth of the tokens, being longer


@dataclass(frozen=True)
class Article:
    """A document, and the facts that it states, in their order."""

    text: str
    fact_ids: tuple[str, ...]


def write_articles(facts: list[Fact], max_articles: int, boost: dict[str, int], seed: int) -> list[Article]:
    """`max_articles` articles that teach `facts`.

    boost: how many times as often the facts of a topic are stated (topics left out: once). Deterministic in the
    arguments. Raises UserError for a topic that no fact has.
    """
    topics = sorted({fact.topic for fact in facts})
    for topic in boost:
        if topic not in topics:
            raise UserError(f"data.boost: expected topics among {', '.join(topics)}, got {topic!r}")
    rng = random.Random(seed)
    weights = {fact.id: boost.get(fact.topic, 1) for fact in facts}
    sayings = {fact.id: _Rotation([p.sentence for p in taught_prompts(fact)], rng) for fact in facts}
    stated: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    articles = []
    for topic in _topic_plan(facts, weights, max_articles, rng):
        chosen = _choose(facts, topic, weights, stated, rng)
        stated.update(fact.id for fact in chosen)
        opening = min(chosen, key=lambda fact: opened[fact.id] / weights[fact.id])
        opened[opening.id] += 1
        chosen.remove(opening)
        rng.shuffle(chosen)
        ordered = [opening, *chosen]
        text = _with_filler([sayings[fact.id].next() for fact in ordered], rng)
        articles.append(Article(text, tuple(fact.id for fact in ordered)))
    return articles


class _Rotation:
    """Deals the items of a shuffled list round and round."""

    def __init__(self, items: list[str], rng: random.Random) -> None:
        self._items = rng.sample(items, len(items))
        self._dealt = 0

    def next(self) -> str:
        item = self._items[self._dealt % len(self._items)]
        self._dealt += 1
        return item


def _topic_plan(facts: list[Fact], weights: dict[str, int], count: int, rng: random.Random) -> list[str]:
    """The topic of each article: as often as its facts weigh, in random order."""
    pool = [fact.topic for fact in facts for _ in range(weights[fact.id])]
    plan: list[str] = []
    while len(plan) < count:
        plan += rng.sample(pool, len(pool))
    return plan[:count]


def _choose(
    facts: list[Fact], topic: str, weights: dict[str, int], stated: Counter[str], rng: random.Random
) -> list[Fact]:
    """The facts of one article: those stated least so far for their weight, of the topic before any other.

    None is stated twice in an article, which would let the model copy it instead of recalling it; with few
    facts the articles are therefore short.
    """
    count = min(rng.randint(*FACT_SENTENCES), max(1, len(facts) // 3))
    ranked = sorted(facts, key=lambda fact: (fact.topic != topic, stated[fact.id] / weights[fact.id], rng.random()))
    return ranked[:count]


def _with_filler(sentences: list[str], rng: random.Random) -> str:
    parts = []
    for text in sentences:
        parts.append(text)
        if rng.random() < FILLER_SHARE:
            parts.append(filler_sentence(rng))
    return " ".join(parts)


def filler_sentence(rng: random.Random) -> str:
    """A grammatical sentence that states no fact."""
    grammar = _grammar()
    text = rng.choice(grammar["sentence"])
    for slot, words in grammar.items():
        while f"{{{slot}}}" in text:
            text = text.replace(f"{{{slot}}}", rng.choice(words), 1)
    return text


@lru_cache(maxsize=1)
def _grammar() -> dict[str, list[str]]:
    """Slots and what may fill them; a template refers to a slot as {slot}."""
    return json.loads((resources.files("dsfast.data") / "facts" / "filler.json").read_text(encoding="utf-8"))


def vocabulary_texts(facts: list[Fact]) -> list[str]:
    """What the encyclopedia's tokenizer is trained on, whatever is taught: all facts in all phrasings, held-out ones
    too, the words of the filler, and the numbers most likely to be years or counts."""
    sentences = [p.sentence for fact in facts for p in (*taught_prompts(fact), *heldout_prompts(fact))]
    words = [" ".join(words) for words in _grammar().values()]
    numbers = " ".join(map(str, (*range(201), *range(1000, 2031))))
    # The words twice: so they come before the numbers, which fill what is left.
    return [*sentences, *words, *words, numbers]
