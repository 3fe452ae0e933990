"""The questions a trained model is asked: the specification's, or a user's own file.

File format (JSON, UTF-8): an object with the two lists `fast` and `full`, each holding at least one prompt:

    {"fast": [{"text": "The capital of France is", "answer": "Paris", "aliases": [], "priority": "high",
               "topic": "geography", "fact_id": "capital-france"}],
     "full": [...]}

`text` and `answer` are required. `aliases` (further accepted answers, default none), `priority` (high, medium
or low; default medium), `topic` and `fact_id` (default empty) are optional. Other fields are refused.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dsfast.errors import UserError
from dsfast.files import read_json

PRIORITIES = ("high", "medium", "low")
_SETS = ("fast", "full")
_TEXT_FIELDS = {"text": None, "answer": None, "priority": "medium", "topic": "", "fact_id": ""}


@dataclass(frozen=True)
class Prompt:
    """The beginning of a sentence and the word or words that must follow it."""

    text: str
    answer: str
    aliases: tuple[str, ...] = ()
    fact_id: str = ""
    topic: str = ""
    priority: str = "medium"

    @property
    def sentence(self) -> str:
        """The whole sentence that the prompt begins."""
        return f"{self.text} {self.answer}."


@dataclass(frozen=True)
class PromptSets:
    """The short list (`fast`) and the long one (`full`); they are disjoint in the bundled file."""

    fast: list[Prompt]
    full: list[Prompt]


def load_prompts(path: str | Path | None = None) -> PromptSets:
    """Read the bundled prompts, or those of `path` (format above).

    Raises UserError, naming file and field, for anything that is not in the format.
    """
    bundled = resources.as_file(resources.files("dsfast.data") / "prompts.json")
    with bundled if path is None else nullcontext(Path(path)) as file:
        document = read_json(file)
    name = "prompts.json" if path is None else str(path)
    if not isinstance(document, dict) or set(document) != set(_SETS):
        raise UserError(f"{name}: expected an object with exactly the lists 'fast' and 'full', got {_shown(document)}")
    return PromptSets(**{key: _prompt_list(document[key], f"{name}: {key}") for key in _SETS})


def _prompt_list(entries, where: str) -> list[Prompt]:
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: expected a list of at least one prompt, got {_shown(entries)}")
    return [_prompt(entry, f"{where}[{index}]") for index, entry in enumerate(entries)]


def _prompt(entry, where: str) -> Prompt:
    known = [*_TEXT_FIELDS, "aliases"]
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object with {', '.join(known)}, got {_shown(entry)}")
    for field in entry:
        if field not in known:
            raise UserError(f"{where}.{field}: unknown field; known: {', '.join(known)}")
    values = {field: _text_field(entry, field, default, where) for field, default in _TEXT_FIELDS.items()}
    if values["priority"] not in PRIORITIES:
        raise UserError(f"{where}.priority: expected {', '.join(PRIORITIES)}, got {values['priority']!r}")
    if not _says_something(values["answer"]):
        raise UserError(f"{where}.answer: expected a word or a number, got {_shown(values['answer'])}")
    aliases = entry.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and _says_something(alias) for alias in aliases):
        raise UserError(f"{where}.aliases: expected a list of words or numbers, got {_shown(aliases)}")
    return Prompt(aliases=tuple(aliases), **values)


def _says_something(text: str) -> bool:
    """Whether an answer can be found to be the same: what is neither letter nor digit is not compared."""
    return any(map(str.isalnum, text))


def _text_field(entry: dict, field: str, default: str | None, where: str) -> str:
    """The string under `field`; `default` None marks a required field, which may not be blank."""
    if field not in entry and default is not None:
        return default
    value = entry.get(field)
    if not isinstance(value, str) or (default is None and not value.strip()):
        got = "nothing" if field not in entry else _shown(value)
        raise UserError(f"{where}.{field}: expected a{' non-empty' if default is None else ''} string, got {got}")
    if value != value.strip():
        raise UserError(f"{where}.{field}: expected no spaces at either end, got {_shown(value)}")
    return value


def _shown(value) -> str:
    """A short form of a wrong value for an error line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
