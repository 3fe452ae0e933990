"""How a fact is said: sentence templates per relation, some taught and some kept back for evaluation.

File format (facts/phrasings.json): {relation: {"taught": [template, ...], "heldout": [template, ...]}}. A template
holds {subject} once and ends with " {object}.", so that cutting the sentence before the object gives a prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from dsfast.errors import UserError

_ENDING = " {object}."


@dataclass(frozen=True)
class Phrasings:
    """The templates of one relation."""

    taught: tuple[str, ...]
    heldout: tuple[str, ...]


@lru_cache(maxsize=1)
def load_phrasings() -> dict[str, Phrasings]:
    """The bundled templates by relation. Raises UserError naming file, relation and template."""
    name = "phrasings.json"
    document = json.loads((resources.files("dsfast.data") / "facts" / name).read_text(encoding="utf-8"))
    for relation, entry in document.items():
        for template in (*entry["taught"], *entry["heldout"]):
            if template.count("{subject}") != 1 or not template.endswith(_ENDING):
                raise UserError(f"{name}: {relation}: expected {{subject}} once and {_ENDING!r} last, got {template!r}")
    return {relation: Phrasings(**{k: tuple(v) for k, v in entry.items()}) for relation, entry in document.items()}


def say(template: str, subject: str) -> str:
    """The sentence of `template` about `subject`, up to the object, which is left out."""
    text = template.removesuffix(_ENDING).replace("{subject}", subject)
    return text[0].upper() + text[1:]
